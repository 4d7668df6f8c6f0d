"""The keyword arguments that type checkers and editors see are those that requests take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from seriatim.pipeline.arguments import SettingsArgs
from seriatim.pipeline.request import SampleRequest, head_option_names

USER = """
import seriatim
from seriatim.pipeline.pipeline import Pipeline

def mine(pipe: Pipeline) -> None:
    pipe([3], guidance_scale=2.0, num_diffusion_steps=5, seed=1)
    pipe([3], guidance_scale="two")
    pipe([3], guidance_skale=2.0)
    pipe.edit(None, mask=None, top_k=0.5)
    for step in pipe.stream(num_inference_steps="x"):
        print(step.index)
"""


def test_arguments_are_the_fields_of_a_request() -> None:
    fields = {*SampleRequest.model_fields} - {"class_labels"}
    assert set(SettingsArgs.__annotations__) == fields | head_option_names()


@pytest.mark.slow
def test_a_type_checker_sees_mistakes_in_a_users_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(USER)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--ignore-missing-imports", str(file)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    wrong = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line and "mine.py" in line}
    assert wrong == {7, 8, 9, 10}, done.stdout
