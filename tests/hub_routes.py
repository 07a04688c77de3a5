"""The repositories of `hub_emulator` and the routes that read and change them."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import urllib.parse

RULES = []  # (method, pattern, function), in the order of their definition


def _route(method, pattern):
    return lambda function: RULES.append((method, re.compile(pattern + r"\Z"), function)) or function


_ID = r"/api/models/(?P<repo>[^/]+/[^/]+)"


def git_oid(data):
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324


@dataclasses.dataclass(frozen=True)
class Blob:
    """A file's content, and whether it is kept as LFS."""

    data: bytes
    lfs: bool

    @property
    def sha256(self):
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return git_oid(pointer.encode() if self.lfs else self.data)

    def entry(self, path):
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", "path": path, "size": len(self.data), "oid": self.oid, **lfs}


class Repo:
    """Commits are immutable trees `{path: Blob}`; references name commits."""

    def __init__(self, name, *, private=False, gated=False):
        self.name, self.private, self.gated = name, private, gated
        self.trees, self.refs, self.pulls, self.titles = {}, {}, [], {}
        self.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", lfs=False)}, "initial commit")

    def commit(self, ref, changes, title="change"):
        """Put `changes` on top of `ref`; returns the new commit's name."""
        tree = {**self.trees.get(self.refs.get(ref), {}), **changes}
        oid = hashlib.sha1(f"{self.name}{ref}{len(self.trees)}".encode()).hexdigest()  # noqa: S324
        self.trees[oid], self.refs[ref], self.titles[oid] = tree, oid, title
        return oid

    def resolve(self, revision):
        """The commit that a branch, reference or commit name means, or None."""
        return self.refs.get(revision) or (revision if revision in self.trees else None)

    def files(self, revision="main"):
        """`{path: bytes}` at a revision, without what every repository starts with."""
        tree = self.trees[self.resolve(revision)]
        return {path: blob.data for path, blob in tree.items() if path != ".gitattributes"}


class Answer(Exception):  # noqa: N818
    """Ends a route early with a status and the Hub's error headers."""

    def __init__(self, status, code="", message=""):
        super().__init__(status)
        self.status = status
        self.headers = {k: v for k, v in (("X-Error-Code", code), ("X-Error-Message", message)) if v}


@dataclasses.dataclass
class Call:
    """What a route sees of its request."""

    hub: object
    method: str
    host: str
    headers: dict
    query: dict
    body: bytes

    @property
    def known(self):
        return self.headers.get("authorization") == f"Bearer {self.hub.token}"

    def repo(self, name, *, write=False):
        repo = self.hub.repos.get(name)
        if self.headers.get("authorization") and not self.known:
            raise Answer(401, "", "Invalid credentials in Authorization header")
        if repo is None or (repo.private and not self.known):
            raise Answer(404 if self.known else 401, "RepoNotFound", "Repository not found")
        if repo.gated and not write:
            raise Answer(403, "GatedRepo", "Access to this model is restricted")
        if write and not self.known:
            raise Answer(401, "", "Unauthorized")
        if write and name.partition("/")[0] != self.hub.user:
            raise Answer(403, "", "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def commit(self, repo, revision):
        oid = repo.resolve(revision or "main")
        if oid is None:
            raise Answer(404, "RevisionNotFound", "Invalid rev id")
        return oid

    def json(self):
        return json.loads(self.body)


def _json(value, status=200, **headers):
    return status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode()


@_route("GET", "/api/whoami-v2")
def _whoami(call):
    return _json({"type": "user", "name": call.hub.user, "orgs": []}) if call.known else _json({}, 401)


@_route("POST", "/api/validate-yaml")
def _validate(call):
    front = call.json()["content"].split("---")[1:2]
    bad = any(re.search(r"^license: invented", text, re.MULTILINE) for text in front)
    return (
        _json({"errors": [{"message": '"license" must be one of the known'}]}, 400) if bad else _json({"warnings": []})
    )


@_route("POST", "/api/repos/create")
def _create(call):
    wanted = call.json()
    name = f"{wanted.get('organization') or call.hub.user}/{wanted['name']}"
    if not call.known:
        raise Answer(401, "", "Invalid username or password.")
    if name.partition("/")[0] != call.hub.user:
        raise Answer(403, "", "You don't have the rights to create a model under this namespace")
    if name in call.hub.repos:
        return _json({"error": "You already created this model repo", "url": f"{call.hub.url}/{name}"}, 409)
    call.hub.repo(name, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
    return _json({"url": f"{call.hub.url}/{name}"})


@_route("GET", _ID + "(/revision/(?P<rev>[^/]+))?")
def _info(call, repo, rev):
    found = call.repo(repo)
    oid = call.commit(found, rev)
    siblings = [{"rfilename": path} for path in sorted(found.trees[oid])]
    return _json({"id": repo, "sha": oid, "private": found.private, "gated": False, "tags": [], "siblings": siblings})


@_route("GET", _ID + "/tree/(?P<rev>[^/]+)")
def _tree(call, repo, rev):
    tree = (found := call.repo(repo)).trees[call.commit(found, rev)]
    start, names = int(call.query.get("cursor", 0)), sorted(tree)
    if call.query.get("recursive", "").lower() != "true":
        names = [name for name in names if "/" not in name]
    stop = start + call.hub.page_size
    link = f'<{call.hub.url}/api/models/{repo}/tree/{rev}?recursive=True&cursor={stop}>; rel="next"'
    return _json(
        [tree[name].entry(name) for name in names[start:stop]], **({"Link": link} if stop < len(names) else {})
    )


@_route("POST", _ID + "/paths-info/(?P<rev>[^/]+)")
def _paths(call, repo, rev):
    tree = (found := call.repo(repo)).trees[call.commit(found, rev)]
    wanted = urllib.parse.parse_qs(call.body.decode())["paths"]
    return _json([tree[name].entry(name) for name in wanted if name in tree])


@_route("GET", _ID + "/refs")
def _refs(call, repo):
    found = call.repo(repo)
    rows = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in found.refs.items()]
    return _json({"branches": rows, "tags": [], "converts": []})


@_route("POST", _ID + "/branch/(?P<branch>[^/]+)")
def _branch(call, repo, branch):
    found = call.repo(repo, write=True)
    if branch in found.refs:
        return _json({"error": "exists"}, 409)
    found.refs[branch] = call.commit(found, call.json().get("startingPoint"))
    return _json({})


@_route("GET", _ID + "/discussions")
def _discussions(call, repo):
    now = "2026-01-01T00:00:00.000Z"
    rows = [
        {"num": number, "title": title, "author": {"name": call.hub.user}, "createdAt": now, "status": "open",
         "repo": {"name": repo, "type": "model"}, "isPullRequest": True}
        for number, title in reversed(list(enumerate(call.repo(repo).pulls, 1)))
    ]  # fmt: skip
    return _json({"discussions": rows, "count": len(rows), "start": 0})


@_route("POST", _ID + "/preupload/(?P<rev>[^/]+)")
def _preupload(call, repo, rev):
    found = call.repo(repo, write=not call.query.get("create_pr"))
    tree, files = found.trees[call.commit(found, rev)], []
    for file in call.json()["files"]:
        lfs = file["path"].endswith((".safetensors", ".gguf")) or b"\0" in base64.b64decode(file["sample"])
        old = tree.get(file["path"])
        oid = (old.sha256 if old.lfs else old.oid) if old else None
        mode = "lfs" if lfs else "regular"
        files.append(
            {"path": file["path"], "uploadMode": mode, "shouldIgnore": file["path"] in call.hub.ignored, "oid": oid}
        )
    return _json({"files": files})


@_route("POST", "/(?P<repo>[^/]+/[^/]+)[.]git/info/lfs/objects/batch")
def _batch(call, repo):
    call.repo(repo)
    objects = [
        {"oid": oid, "size": item["size"]} if (oid := item["oid"]) in call.hub.objects else
        {"oid": oid, "size": item["size"], "actions": {
            "upload": {"href": f"{call.hub.cdn}/lfs/{oid}"}, "verify": {"href": f"{call.hub.url}/verify"}}}
        for item in call.json()["objects"]
    ]  # fmt: skip
    return _json({"transfer": "basic", "objects": objects})


@_route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def _put(call, oid):
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise Answer(400, "", "checksum mismatch")
    call.hub.objects[oid] = call.body
    return 200, {}, b""


@_route("POST", "/verify")
def _verify(call):
    return _json({}, 200 if call.json()["oid"] in call.hub.objects else 404)


@_route("POST", _ID + "/commit/(?P<rev>[^/]+)")
def _commit(call, repo, rev):
    pull = bool(call.query.get("create_pr"))
    found = call.repo(repo, write=not pull)
    lines = [json.loads(line) for line in call.body.splitlines()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    if header.get("parentCommit") not in (None, call.commit(found, rev)) and not pull:
        raise Answer(412, "", "A commit has happened since. Please refresh and try again.")
    changes = {}
    for line in lines:
        if line["key"] == "file":
            changes[line["value"]["path"]] = Blob(base64.b64decode(line["value"]["content"]), lfs=False)
        elif line["key"] == "lfsFile":
            changes[line["value"]["path"]] = Blob(call.hub.objects[line["value"]["oid"]], lfs=True)
    ref = rev
    if pull:
        found.pulls.append(header["summary"])
        ref = f"refs/pr/{len(found.pulls)}"
        found.refs[ref] = call.commit(found, rev)
    oid = found.commit(ref, changes, header["summary"])
    number = {"pullRequestUrl": f"{call.hub.url}/{repo}/discussions/{len(found.pulls)}"} if pull else {}
    return _json({"commitOid": oid, "commitUrl": f"{call.hub.url}/{repo}/commit/{oid}", "success": True, **number})


@_route("GET", "/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
def _resolve(call, repo, rev, path):
    found = call.repo(repo)
    oid = call.commit(found, rev)
    blob = found.trees[oid].get(path)
    headers = {"X-Repo-Commit": oid}
    if blob is None:
        return 404, {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b""
    if not blob.lfs:
        return _content(call, blob, {**headers, "ETag": f'"{blob.oid}"'})
    call.hub.objects[blob.sha256] = blob.data
    linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data)), "ETag": f'"{blob.oid}"'}
    return 302, {**headers, **linked, "Location": f"{call.hub.cdn}/cdn/{blob.sha256}"}, b""


@_route("GET", "/cdn/(?P<oid>[0-9a-f]{64})")
def _cdn(call, oid):
    return _content(call, Blob(call.hub.objects[oid], lfs=True), {"ETag": f'"{oid}"'})


def _content(call, blob, headers):
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", ""))
    if not wanted:
        return 200, {**headers, "Accept-Ranges": "bytes"}, blob.data
    start, stop = int(wanted[1]), min(int(wanted[2] or len(blob.data)) + 1, len(blob.data))
    if start >= len(blob.data):
        return 416, {"Content-Range": f"bytes */{len(blob.data)}"}, b""
    return 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(blob.data)}"}, blob.data[start:stop]
