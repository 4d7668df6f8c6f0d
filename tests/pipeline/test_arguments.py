"""The keyword arguments that type checkers, editors and `help()` see are those that requests take."""

from __future__ import annotations

import inspect
import os
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import seriatim
from seriatim.pipeline.arguments import SettingsArgs
from seriatim.pipeline.pipeline import Pipeline
from seriatim.pipeline.request import SampleRequest, head_option_names

ROOT = Path(__file__).resolve().parents[2]
RIGHT = """
from pathlib import Path

import seriatim
from seriatim import Bundle, Head, Keys, Parallel, SampleRequest, Tokenizer, read_recipe
from seriatim.testing import check_head

pipe = seriatim.load(Path("model"), device="cpu", prepare=False)
result = pipe([3, "cat", None], guidance_scale=2, num_diffusion_steps=5, seed=1, order=[1, 0])
result.images[0].save("cat.png")
data: bytes = result.png(0)
seeds: list[int] = result.seeds
for step in pipe.stream(3, top_k=5):
    print(step.index + 1)
pipe(request=SampleRequest())
pipe(request=SampleRequest(class_labels=(1, "cat"), order="raster", seeds=(1, 2), head_options={"mine": 1}))
request: SampleRequest = pipe.request(class_labels=["cat"], head_options={"mine": 1}, temperature=0.9)
scale: float = request.guidance_scale
pipe.edit(None, mask=None, num_inference_steps=8)
pipe.regenerate(result, [0], seed=3)
few: seriatim.SettingsArgs = {"num_inference_steps": 4, "top_p": 0.9}
pipe(["cat"], **few)
url: str = seriatim.Pipeline.from_pretrained("owner/name").push_to_hub("me/mine", private=True)
rate: float = read_recipe("mar-digits").training.learning_rate
keys: Keys = Keys.of_seeds([1, 2])
"""
WRONG = """
import seriatim

pipe = seriatim.load("model")
pipe([3], guidance_scael=2)  # call-arg
pipe([3], seed="x")  # arg-type
print(pipe([3]).imagez)  # attr-defined
seriatim.load("model", divice="cpu")  # call-arg
"""
ALSO_WRONG = """
import seriatim
from seriatim.heads import Haed  # attr-defined

pipe = seriatim.Pipeline.from_pretrained("model", prepare="no")  # arg-type
pipe.edit(None, mask=None, top_k=0.5)  # arg-type
pipe.stream(num_inference_steps="x")  # arg-type
pipe.request(class_lables=[1])  # call-arg
pipe.request().guidance_skale  # attr-defined
seriatim.SampleRequest(temperatur=1)  # call-arg
seriatim.laod("model")  # attr-defined
"""
# The types of other libraries take a minute to read and are not what is tested.
CONFIG = """[mypy]
follow_imports = silent
ignore_missing_imports = True
[mypy-torch.*,numpy.*,PIL.*,diffusers.*,sklearn.*,matplotlib.*,safetensors.*,huggingface_hub.*,rich.*,typer.*,yaml.*]
follow_imports = skip
follow_imports_for_stubs = True
"""


def expected(text: str, file: str) -> set[tuple[str, int, str]]:
    marks = [(number, re.search(r"# ([\w-]+)$", line)) for number, line in enumerate(text.splitlines(), 1)]
    return {(file, number, mark[1]) for number, mark in marks if mark}


def test_arguments_are_the_fields_of_a_request() -> None:
    fields = {*SampleRequest.model_fields} - {"class_labels"}
    assert set(SettingsArgs.__annotations__) == fields | head_option_names()


@pytest.mark.parametrize("verb", ["__call__", "stream", "request", "edit", "stream_edit", "regenerate"])
def test_help_names_every_setting(verb: str) -> None:
    parameters = inspect.signature(getattr(Pipeline, verb)).parameters
    assert {*SettingsArgs.__annotations__} <= {*parameters} and "settings" not in parameters
    assert "guidance_scale: float = ...," in pydoc.plain(pydoc.render_doc(getattr(Pipeline, verb)))


def test_a_type_checker_sees_mistakes_in_a_users_file(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    files = {"right.py": RIGHT, "wrong.py": WRONG, "also_wrong.py": ALSO_WRONG}
    for name, text in {**files, "mypy.ini": CONFIG}.items():
        (tmp_path / name).write_text(text)
    kept = getattr(pytestconfig, "cache", None)  # reading the package again takes longer
    cache = tmp_path / "cache" if kept is None else kept.mkdir("mypy-of-users")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=mypy.ini", f"--cache-dir={cache}", *files],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    lines = re.findall(r"^(\S+?):(\d+): error: .*\[([\w-]+)\]$", done.stdout, flags=re.M)
    wanted = {each for name, text in files.items() for each in expected(text, name)}
    assert {(name, int(number), code) for name, number, code in lines} == wanted, done.stdout + done.stderr
    assert len(expected(WRONG, "wrong.py")) == 4


def test_the_package_says_that_it_is_typed() -> None:
    """PEP 561: without this file type checkers ignore the types of an installed package."""
    assert (Path(seriatim.__file__).parent / "py.typed").is_file()
