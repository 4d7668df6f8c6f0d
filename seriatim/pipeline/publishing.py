"""A model's way into a pipeline and out of it: model folders, and repositories of the Hugging Face hub.

The verbs are named as in huggingface_hub and diffusers: `from_pretrained`, `save_pretrained`, `push_to_hub`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Self

import torch

from seriatim import __version__
from seriatim.checkpoints.location import located
from seriatim.checkpoints.native import CARD, Bundle, load_bundle, save_bundle
from seriatim.core.device import pick_device, pick_dtype, plain_torch
from seriatim.core.errors import ResourceError, UsageError, one_line, shown
from seriatim.core.files import expanded
from seriatim.core.hub import NAME, Access
from seriatim.core.markdown import block, inline
from seriatim.models.build import parameter_count
from seriatim.nn.prepare import prepare
from seriatim.pipeline.metadata import versions

MOST_NAMES = 20  # of classes that a card lists


class Stored:
    """A model with its tokenizer on a device, which can be read and written; `Pipeline` adds the sampling."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        source: str = "",
    ) -> None:
        """Use `bundle` on `device`. None keeps the model's device; any other value moves the model in place."""
        self.bundle, self.source = bundle, source
        self.owned = False  # an owned model is never trained and stays in evaluation mode
        self.model, self.tokenizer = bundle.model, bundle.tokenizer
        self.device = self.model.device if device is None else pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.versions = versions(self.device, self.dtype)  # what generates the same images again
        if device is not None:
            self.model.to(self.device)
            self.tokenizer.to(self.device)

    def prepare(self) -> Self:
        """Lay the model's weights out for sampling, in place, as `load` does. It is then faster but not trainable."""
        self.owned = True
        self.model.eval()
        self.tokenizer.eval()
        prepare(self.model.backbone, self.dtype, keep=("token_embed",))  # it takes tokens, which are float32
        prepare(self.model.head)
        return self

    @property
    def class_names(self) -> list[str]:
        """The names of the model's classes, in the order of their numbers; empty if they have none."""
        return self.bundle.class_names

    @property
    def defaults(self) -> dict[str, Any]:
        """The sampling settings that the model was saved with; arguments of a call override them."""
        return dict(self.bundle.sampling)

    @classmethod
    @plain_torch()
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        prepare: bool = True,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """The same as `seriatim.load`, under the name that huggingface_hub and diffusers have for it."""
        text = os.fspath(name)
        bundle = load_bundle(located(text, revision, Access(token, cache_dir, local_files_only)))
        pipe = cls(bundle, device=device, dtype=dtype, source=text)
        return pipe.prepare() if prepare else pipe

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write a model folder that `load` can read, without a card, and return its path.

        The folder must be new, empty or a model folder, which is replaced when the new one is complete. Raises
        UsageError if it is something else, or if the weights were rounded for sampling (`load(..., prepare=False)`
        keeps them), and NumericsError if a weight is not finite.
        """
        return save_bundle(self.bundle, Path(folder))

    def save_pretrained(self, folder: str | os.PathLike[str], *, card: str | None = None) -> Path:
        """Write a model folder with a model card, its README.md, and return its path.

        `card` is the text of the card. None keeps that of `folder`, if it has one, or else that of the folder from
        which the model was loaded; without either a card is made that tells what the model is and how to sample from
        it. `load` and `from_pretrained` read the folder. The errors are those of `save`.
        """
        there = Path(folder)
        text = card or read_card(there) or self._card_of_source() or model_card(self.bundle, there.resolve().name)
        return save_bundle(self.bundle, there, card=text)

    def _card_of_source(self) -> str | None:
        return read_card(expanded(self.source)) if self.source else None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload a model of Seriatim",
        card: str | None = None,
    ) -> str:
        """Write the model folder to a repository of the hub, which is made if it is not there; return the commit's URL.

        `repo_id` is `owner/name`, or `name` for the account whose token it is. `private` is for a new repository.
        `token` None means the token that was saved at login (`hf auth login`). `branch` None means the main branch,
        and `create_pr` proposes the commit instead of making it. `card` is the text of the model card; None leaves a
        card that the repository has, and otherwise makes one as `save_pretrained` does.

        Raises UsageError if `repo_id` is no name of a repository, and ResourceError if the hub can't be reached or
        refuses.
        """
        from huggingface_hub import HfApi

        if NAME.fullmatch(repo_id if "/" in repo_id else f"me/{repo_id}") is None or "@" in repo_id:
            raise UsageError(f"repo_id: {shown(repo_id)} is not allowed; give owner/name")
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as temporary:
            text = card or self._card_of_source() or model_card(self.bundle, repo_id.rpartition("/")[2], repo_id)
            folder = save_bundle(self.bundle, Path(temporary) / "model", card=text)
            try:
                name = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
                theirs = card is None and api.file_exists(name, CARD, revision=branch)
                commit = api.upload_folder(
                    repo_id=name,
                    folder_path=folder,
                    commit_message=commit_message,
                    revision=branch,
                    create_pr=create_pr,
                    ignore_patterns=[CARD] if theirs else None,
                )
            except Exception as error:  # the hub's client has many error types: offline, no permission, ...
                raise ResourceError(
                    f"repo_id: {shown(repo_id)} could not be written ({one_line(error)[:200]}); log in with "
                    "`hf auth login`, or give a token that may write"
                ) from error
        return str((create_pr and commit.pr_url) or commit.commit_url)


def read_card(folder: Path) -> str | None:
    """The text of the model card in a folder; None if there is none that can be read."""
    try:
        return (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def model_card(bundle: Bundle, title: str, name: str = "path/to/this/folder") -> str:
    """The text of a model card: what the model is, its classes and settings, and how to sample from it by `name`."""
    model, tokenizer, names = bundle.model, bundle.tokenizer, bundle.class_names
    pictures = tokenizer.pictures
    classes = ", ".join(inline(each) for each in names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")
    label = next((repr(each) for each in names if each.isprintable()), "0") if model.classes else "None"
    parts = {"model": model, "backbone": model.backbone, "head": model.head, "tokenizer": tokenizer}
    kinds = "\n".join(f"- {what}: {type(part).__name__}" for what, part in parts.items())
    size = f"- images: {tokenizer.size[0]}x{tokenizer.size[1]} pixels\n" if pictures else ""
    settings = ", ".join(f"{key} {inline(str(value))}" for key, value in bundle.sampling.items())
    last = '.images[0].save("image.png")' if pictures else ".images  # an array"
    python = f"import seriatim\n\nseriatim.load({name!r})(class_labels=[{label}], seed=0){last}"
    return f"""---
library_name: seriatim
pipeline_tag: {"unconditional-image-generation" if pictures else "other"}
tags: [{"autoregressive, image-generation" if pictures else "autoregressive"}]
---

# {inline(title)}

An autoregressive model of {parameter_count(model):,} parameters, written by Seriatim {__version__}.

{kinds}
- tokens: {model.tokens}
{size}- classes: {classes or model.classes or "none"}
- settings of sampling: {settings or "the defaults"}

{block(python, "python")}
"""
