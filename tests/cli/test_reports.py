"""What people read after each command, on real runs; push and pull against an emulated Hub; the demo."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from loratools.cli.layout import count, counted, page, size, some, table


def test_extract_then_merge_then_unmerge(run, workdir):
    """The story of a checkpoint pair, in words: modules, ranks, captured, least captured; counts; bit for bit."""
    shown = run("extract", "base", "tuned", "-o", "out", "--rank", "2", "--exclude", "embed_tokens").stdout
    assert "5 low-rank modules" in shown
    assert re.search(r"captured +\d\d?\.\d{4}% of ‖ΔW‖², residual 0\.\d+", shown)
    assert shown.count("  least ") == 3
    assert "left out  model.embed_tokens.weight: excluded by the patterns" in shown
    shown = run("merge", "base", "out", "-o", "merged", "-w", "0.5").stdout
    assert shown.startswith("Merged 1 adapter into the base.")
    assert "out, weight 0.5" in shown
    assert "2 copied, 5 merged" in shown
    assert re.search(r"receipt +[\d.]+ KiB, from which unmerge gives the base back", shown)
    (workdir / "merged/loratools.receipt").unlink()
    again = ("--receipt-for", "merged", "-o", "merged/loratools.receipt")
    shown = run("merge", "base", "out", "-w", "0.5", *again).stdout
    assert shown.startswith("Wrote a receipt of 1 adapter.")
    assert "5 recorded, 2 unchanged" in shown
    shown = run("unmerge", "merged", "out", "--base", "base", "-o", "again").stdout
    assert "bit for bit" in shown
    assert "7, of which 5 held an adapter" in shown
    assert (workdir / "again/model.safetensors").read_bytes() == (workdir / "base/model.safetensors").read_bytes()
    shown = run("unmerge", "merged", "-o", "back").stdout
    assert "receipt: bit for bit" in shown
    assert (workdir / "back/model.safetensors").read_bytes() == (workdir / "base/model.safetensors").read_bytes()
    (workdir / "merged/loratools.receipt").unlink()
    shown = run("unmerge", "merged", "out", "-o", "subtracted").stdout
    assert re.search(r"bound +\d\.\d+e-\d+ per entry", shown)


def test_a_recast_has_no_adapter(run, workdir):
    assert run("merge", "base", "-o", "out", "--dtype", "bf16").stdout.startswith("Wrote the checkpoint anew.")


def test_stack_and_rescale(run, workdir):
    """Weights, ranks, alphas; what the patterns leave out is named with the reason."""
    shown = run("stack", "adapter", "adapter", "-w", "1", "-w", "-0.5", "-o", "both", "--include", "q_proj").stdout
    assert "Stacked 2 adapters: 2 modules." in shown
    assert "adapter, weight -0.5" in shown
    assert "4, 8 in all" in shown
    assert "excluded by the patterns" in shown
    shown = run("rescale", "both", "--by", "0.5", "-o", "half").stdout
    assert "Rescaled 1 adapter: 2 modules." in shown
    assert re.search(r"alphas +\S+", shown)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    folder = str(Path(__file__).parents[1])
    monkeypatch.syspath_prepend(folder)
    with importlib.import_module("hub_emulator").HubEmulator() as emulator:
        emulator.install(monkeypatch, tmp_path / "home")
        yield emulator
    for name in ("hub_emulator", "hub_routes"):
        sys.modules.pop(name, None)


def test_push_and_pull(hub, run, workdir):
    """Plan, publish, publish again, fetch: the text names the files, the commit, what stays behind."""
    (workdir / "adapter" / "training_args.bin").write_bytes(b"pickle")
    shown = run("push", "adapter", "me/new", "--private", "--dry-run").stdout
    assert "nothing is sent" in shown
    assert "repository (private)" in shown
    assert "adapter_model.safetensors" in shown
    assert "left out" in shown
    assert "training_args.bin: " in shown
    assert "me/new" not in hub.repos
    result = run("push", "adapter", "me/new")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"Published {hub.url}")
    assert run("push", "adapter", "me/new").stdout.startswith("Published before: ")
    shown = run("pull", "me/new", "-o", "fetched", "--dry-run").stdout
    assert "nothing is written" in shown
    assert not (workdir / "fetched").exists()
    shown = run("pull", "me/new", "-o", "fetched").stdout
    assert shown.startswith("Fetched me/new@")
    name = "adapter_model.safetensors"
    assert (workdir / "fetched" / name).read_bytes() == (workdir / "adapter" / name).read_bytes()


def test_demo(run, workdir, monkeypatch):
    """The command hands on story, output and seed, and prints the table."""
    import loratools.verbs.demo as verb

    class Told:
        output = Path("kept")

        def table(self):
            return [("", "bytes"), ("base", "12")]

        def to_json(self):
            return {"schema": "loratools/demo/1"}

    asked = []

    def demo(story, output, *, seed, on_event):
        asked.append((story, output, seed))
        on_event(type("Step", (), {"what": "train", "number": 1, "total": 2}))
        return Told()

    monkeypatch.setattr(verb, "demo", demo)
    shown = run("demo", "adapt", "-o", "kept", "--seed", "3").stdout
    assert shown == "      bytes\nbase     12\nIts files are in kept.\n"
    assert run("demo", "--json").stdout == '{"schema": "loratools/demo/1"}\n'
    assert asked == [("adapt", "kept", 3), ("adapt", None, 0)]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (5 * 2**20, "5.0 MiB"), (2**30, "1.0 GiB"),
     (3 * 2**40, "3.00 TiB")],
)  # fmt: skip
def test_sizes_for_people(nbytes, text):
    assert size(nbytes) == text


def test_pieces_of_text():
    """Singular and plural, the first of many, counts without zeros, aligned columns, hostile names."""
    assert (count(1, "tensor"), count(2000, "tensor")) == ("1 tensor", "2,000 tensors")
    assert some(["a", "b"]) == "a, b"
    assert some(["a\x1b", "b", "c", "d"]) == "a\\x1b, b, c, … (4 in all)"
    assert counted({"merged": 2, "added": 0}) == "2 merged"
    assert counted({}) == "none"
    assert page("Done.", [("a", "1"), ("bb", ""), ("cc", "3")], ["so"]) == ["Done.", "  a   1", "  cc  3", "  note: so"]
    assert table([("", "x"), ("a", "12")]) == ["    x", "a  12"]


def test_rescale_by_norm_block_and_factor(run, workdir):
    """Norms, blocks and factors that were widened, in words."""
    shown = run("rescale", "adapter", "--norm", "0.1", "-o", "capped").stdout
    assert re.search(r"norms +\d+ of \d+ brought down to 0\.1; the largest was [\d.]+, of model\.", shown)
    shown = run("rescale", "adapter", "--blocks", "q_proj=0.3", "--factor", "lora_B", "-o", "blocks").stdout
    assert re.search(r"blocks +0\.3 for \d+ modules?, 1 for \d+ modules?", shown)
    refused = run("rescale", "adapter", "--blocks", "1,1,1", "-o", "x")
    assert refused.exit_code == 2
    assert "12, 17, 20, 26, 61 numbers, not 3" in refused.stderr
    refused = run("rescale", "adapter", "--blocks", ",".join("1" * 17), "-o", "x")
    assert refused.exit_code == 2
    assert "in no block that is known here" in refused.stderr
    assert run("rescale", "adapter", "--by", "2", "--absent", "2", "-o", "x").exit_code == 2
    assert not (workdir / "x").exists()
