"""Command-line options for the settings of a request: one for each field of `SampleRequest` and of heads' `Options`.

A command registered with `cls=SamplingVerb` has all of these options, and finds those that the user gave in
`context.obj`. The options are made when the command runs or prints its help, because the heads need torch and
`seriatim --help` should not load it. A head of your own has its options here too once it is in `HEADS`.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

PLAIN = (bool, int, float, str)
OWN = ("class_labels", "seeds", "head_options")  # commands define other options in the place of these


class SamplingVerb(TyperCommand):
    """A command that has the settings of a request as options."""

    def get_params(self, ctx: Any) -> list[Any]:
        own = super().get_params(ctx)
        names = {parameter.name for parameter in own}
        if __name__ not in ctx.meta:  # a command asks for its parameters several times
            ctx.meta[__name__] = setting_options()
        own[-1:-1] = [option for option in ctx.meta[__name__] if option.name not in names]  # before --help
        return own

    def invoke(self, ctx: Any) -> Any:
        own = {parameter.name for parameter in self.params}
        ctx.obj = {name: ctx.params.pop(name) for name in list(ctx.params) if name not in own}
        ctx.obj = {name: value for name, value in ctx.obj.items() if value is not None}
        return super().invoke(ctx)


def setting_options() -> list[Any]:
    """A list with an option for each setting, with its help text and its panel in the help."""
    from seriatim.models.registry import HEADS
    from seriatim.pipeline.request import SampleRequest

    annotations: dict[str, Any] = {}
    for name, field in SampleRequest.model_fields.items():
        if name not in OWN:
            extra = field.json_schema_extra
            panel = extra.get("panel") if isinstance(extra, dict) else None
            annotations[name] = option(field.annotation, field.description or "", str(panel or "Images"))
    said: dict[str, dict[str, list[str]]] = {}  # option -> help text -> the heads with that text
    for kind, head in HEADS.items():
        for name, annotation in typing.get_type_hints(head.Options, include_extras=True).items():
            text = next((str(each) for each in getattr(annotation, "__metadata__", ())), "")
            heads = said.setdefault(name, {}).setdefault(text, [])
            if kind not in heads:
                heads.append(kind)
            annotations.setdefault(name, annotation)
    for name, texts in said.items():
        text = " ".join(f"{', '.join(heads)}: {text}" for text, heads in texts.items())
        annotations[name] = option(annotations[name], text, "Head")

    def settings(**_: Any) -> None:
        pass

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(n, keyword, default=None, annotation=a) for n, a in annotations.items()]
    settings.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    settings.__annotations__ = annotations
    verb = typer.Typer(add_completion=False)
    verb.command()(settings)
    return [parameter for parameter in typer.main.get_command(verb).params if parameter.name in annotations]


def option(annotation: Any, text: str, panel: str) -> Any:
    """The annotation of an option that takes values of the setting's type."""
    kind = as_written(annotation)
    if kind is not None:
        return Annotated[kind | None, typer.Option(help=text, rich_help_panel=panel)]
    shown = "<name or numbers>"
    return Annotated[str | None, typer.Option(help=text, rich_help_panel=panel, parser=name_or_numbers, metavar=shown)]


def as_written(annotation: Any) -> Any:
    """The plain type of a setting that may also be None; None if it can have several types, or is a list."""
    if typing.get_origin(annotation) is Annotated:
        return as_written(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [each for each in typing.get_args(annotation) if each is not type(None)]
        return as_written(rest[0]) if len(rest) == 1 else None
    return annotation if annotation in PLAIN or annotation == tuple[float, float] else None


def name_or_numbers(text: str) -> str | list[int]:
    """The value of a text: a list if it holds integers separated by commas, otherwise the text as a name."""
    if not re.fullmatch(r"\s*-?[0-9]{1,18}\s*(,\s*-?[0-9]{1,18}\s*)*", text):
        return text
    return [int(number) for number in text.split(",")]
