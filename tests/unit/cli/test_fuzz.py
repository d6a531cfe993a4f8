"""Arbitrary command lines: each is either accepted or refused on one screen, none ends in a traceback."""

from __future__ import annotations

import contextlib
import io

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from safelight.cli import app
from safelight.cli.sweeping import expand

PLUGIN = "hydra.searchpath=[pkg://toy_plugin.configs]"
pytestmark = pytest.mark.usefixtures("clean_run_environment")

KEYS = (
    "method", "data", "trainer", "callbacks", "logger", "debug", "backbone", "tuned", "experiment", "seed", "name",
    "run_dir", "runs_dir", "resume", "overwrite", "test", "method.lr", "method.keep", "method.mode", "method._target_",
    "data.batch_size", "data._target_", "trainer.max_steps", "trainer.precision", "trainer.strategy",
    "trainer.strategy._target_", "callbacks.checkpoints", "callbacks.progress.kind", "backbone.pretrained",
    "backbone.height", "choices", "hydra", "hydra.searchpath", "_target_", "method.lr.x", "seed.x", "",
)  # fmt: skip
VALUES = (
    "", "null", "~", "toy", "ecodiff", "cpu", "default", "quiet", "none", "tiny_flux", "abc", "0", "1", "-1", "1.5",
    "1e3", "nan", "inf", "true", "???", "[]", "[1,2]", "[toy]", "{}", "{a:1}", "{_target_:os.system}", "${seed}",
    "${method.lr}", "${nope}", "${oc.env:HOME}", "${oc.env:NOPE}", "1,2", "range(0,3)", "glob(*)", "interval(0,1)",
    "choice(1,2)", "int(3)", "'quoted'", '"a b"', "/", ".", "/etc/hostname", "~root", "a/b", "zoo:tiny_flux", "zoo:x",
    "os.system", "torch.nn.Linear", "toy_plugin.toy.Toy", "999999999999999999999999", "[" * 20, "x" * 400, "é", "\n",
)  # fmt: skip
PREFIXES = ("", "", "", "+", "++", "~", "-", "--", "@", "=", " ")

text = st.text(max_size=12)
prefixes, keys = st.sampled_from(PREFIXES), st.sampled_from(KEYS)
known = st.builds(lambda p, k, v: f"{p}{k}={v}", prefixes, keys, st.sampled_from(VALUES))
mixed = st.builds(lambda p, k, v: f"{p}{k}={v}", prefixes, keys, text)
foreign = st.builds(lambda k, v: f"{k}={v}", text, st.sampled_from(VALUES) | text)
deletion = st.sampled_from(KEYS).map(lambda key: f"~{key}")
words = st.lists(known | mixed | foreign | deletion | text, min_size=1, max_size=4)

often = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def answer(arguments: list[str]) -> tuple[int, str]:
    """Exit code and standard error of composing and validating; nothing is trained."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = app.train_main([PLUGIN, "method=toy", *arguments, "--cfg", "job"])
    return code, err.getvalue()


@settings(often, max_examples=120)
@given(words)
@example(["name=\ud800"])
@example(["method=null", "data=null", "~trainer"])
@example(["trainer.strategy={_target_:os.system}", "callbacks=[]", "callbacks.progress.kind=rich"])
def test_accepted_or_refused(arguments: list[str]) -> None:
    arguments = [word for word in arguments if word not in ("-h", "--help", "-m", "--multirun", "--version")]
    code, message = answer(arguments)
    assert code in (0, 2)
    assert (code == 0) == (message == "")
    assert len(message.splitlines()) <= 15
    assert all(sign.isprintable() or sign == "\n" for sign in message.encode("utf-8", "replace").decode())


@settings(often, max_examples=300)
@given(words)
def test_sweeps_expand_or_are_refused(arguments: list[str]) -> None:
    from safelight.errors import SafelightError

    try:
        jobs = expand(arguments)
    except SafelightError:
        return
    assert jobs
    assert all(len(job) == len(arguments) for job in jobs)
