"""`loratools verify`: what it prints, and that the exit code is the answer."""

import json

from tests.cli.conftest import tensors, write_checkpoint


def test_the_answer_is_the_exit_code(run, workdir):
    """0 it is, 1 it is not; `-q` prints nothing."""
    run("merge", "base", "adapter", "-o", "merged", "-w", "0.5")
    asked = ("verify", "merged", "--base", "base", "--adapter", "adapter")
    yes, no = run(*asked, "-w", "0.5"), run(*asked)
    assert (yes.exit_code, no.exit_code) == (0, 1)
    assert yes.stdout.startswith("merged is the base plus adapters.\n")
    assert "4 holds" in yes.stdout
    assert "4 by one-rounding" in yes.stdout
    assert no.stdout.startswith("merged is not the base plus adapters.\n")
    assert "0.5 times what was said" in no.stdout
    assert "scale" in no.stdout
    for weight, code in (("0.5", 0), ("1", 1)):
        quiet = run(*asked, "-w", weight, "-q")
        assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (code, "", "")


def test_cannot_tell_is_3(run, workdir):
    run("rescale", "adapter", "--by", "1e-12", "-o", "tiny")
    result = run("verify", "base", "--base", "base", "--adapter", "tiny")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (3, "base may be the base plus adapters.")


def test_json(run, workdir):
    run("merge", "base", "adapter", "-o", "merged")
    result = run("verify", "merged", "--base", "base", "--adapter", "adapter", "--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["schema"], document["answer"]) == (0, "loratools/verify/1", "holds")


def test_many_deviations_are_counted(run, workdir):
    """Twenty lines, and how many more there are."""
    many = {f"model.layers.{index}.norm.weight": tensors()["model.norm.weight"] for index in range(30)}
    write_checkpoint(workdir / "one", many)
    write_checkpoint(workdir / "two", {name: each + 1 for name, each in many.items()})
    result = run("verify", "two", "--base", "one")
    assert result.exit_code == 1
    assert result.stdout.count("changed") == 20
    assert "… 10 more" in result.stdout


def test_an_output_of_ours(run, workdir):
    """By its files; from its inputs; spoilt; with an input missing, with another one."""
    run("merge", "base", "adapter", "-o", "merged", "-w", "0.5")
    alone, whole = run("verify", "merged"), run("verify", "merged", "adapter", "base")
    assert (alone.exit_code, whole.exit_code) == (0, 0)
    assert whole.stdout.startswith("merged is what its report says.\n")
    assert "adapter, weight 0.5" in whole.stdout
    assert "was not asked" in alone.stdout
    assert "was not asked" not in whole.stdout
    assert run("verify", "merged", "base").exit_code == 3
    assert run("verify", "merged", "tuned", "adapter").exit_code == 65
    assert run("verify", "base").exit_code == 3
    (workdir / "merged" / "README.md").write_text("edited")
    spoilt = run("verify", "merged", "adapter", "base")
    assert (spoilt.exit_code, spoilt.stdout.splitlines()[0]) == (1, "merged is not what its report says.")
    assert "README.md: changed" in spoilt.stdout


def test_usage(run, workdir):
    """Adapters without a base, inputs beside one."""
    assert run("verify", "base", "--adapter", "adapter").exit_code == 2
    assert run("verify", "base", "tuned", "--base", "base").exit_code == 2
    assert run("verify", "nowhere", "--base", "base").exit_code == 66
    assert run("verify", "base", "--base", "adapter").exit_code == 65
