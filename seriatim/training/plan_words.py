"""Say in plain words what was found in a folder of pictures, what will be trained, and what may be expected."""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from seriatim.core.progress import passes_over
from seriatim.data.listing import summary
from seriatim.data.metadata_listing import FILE
from seriatim.data.mirroring import Mirroring
from seriatim.data.survey import Survey
from seriatim.training.plan_table import BY_HEART, EXPECTED, FEW, FEW_OF_A_CLASS, OFTEN

NAMED = 10  # classes that are named
MUCH = 0.2  # the share of pictures, or of a picture, that is worth a word


def found(survey: Survey, mirroring: Mirroring, duplicates: int, background: str) -> list[str]:
    """What is in the folder."""
    sizes = Counter((each.width, each.height) for each in survey.sample)
    (width, height), most = sizes.most_common(1)[0]
    if most == len(survey.sample):
        size = f"all of {width}x{height} pixels"
    else:
        short = [min(each.width, each.height) for each in survey.sample]
        size = f"shorter sides of {min(short)} to {max(short)} pixels, half of them at least {survey.short_side}"
    colours = "grey" if survey.grey else "in colour"
    clear = f"{survey.clear:.0%} with transparent parts, put on {background}" if survey.clear else "none transparent"
    lines = [
        f"found {plural(survey.count, 'picture')} {classes_of(survey)}",
        f"  {size}, {colours}, {clear} ({survey.looked_at:,} were looked at)",
        f"  {'half of them are mirrored' if mirroring.allowed else 'not mirrored'} in training: {mirroring.why}",
    ]
    if survey.bad:
        lines.append(f"  {len(survey.bad)} that can't be read, and will be left out ({summary(survey.bad.values())})")
    if survey.listing.passed_over:
        others = survey.listing.passed_over
        lines.append(f"  {plural(len(others), 'other file')} not used ({summary(others.values())})")
    if duplicates:
        lines.append(f"  {duplicates} of {len(survey.sample):,} are nearly the same as another one")
    return lines


def classes_of(survey: Survey) -> str:
    names, each = survey.names, survey.each
    if not names:
        return "without classes"
    source = f"of the column {survey.classes!r} of {FILE}" if isinstance(survey.classes, str) else "by folder"
    listed = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    many = f"{each[0]:,}" if each[0] == each[-1] else f"{each[0]:,} to {each[-1]:,}"
    kinds = "1 class" if len(names) == 1 else f"{len(names)} classes"
    return f"in {kinds} {source}, {many} each: {listed}"


def warnings(survey: Survey, duplicates: int, size: int) -> list[str]:
    """What these pictures can't give, and what is lost."""
    said = []
    count, each, names = survey.count, survey.each, survey.names
    if count <= BY_HEART:
        only = "the only picture" if count == 1 else f"{count} pictures"
        said.append(f"{only}: the model learns by heart what it sees, and gives it back; new ones need some hundreds")
    elif count <= FEW:
        said.append(f"{count} pictures are few: samples will be near copies of them; some hundreds give new ones")
    if len(names) > 1 and statistics.median(each) < FEW_OF_A_CLASS:
        many = f"{each[0]}" if each[0] == each[-1] else f"{each[0]} to {each[-1]}"
        said.append(
            f"{len(names)} classes of {many}: the model cannot learn what a class looks like; train without classes "
            "(data.classes=false), or add pictures"
        )
    elif len(names) > 1 and each[0] < FEW_OF_A_CLASS:
        counts = Counter(entry.label for entry in survey.listing.entries)
        rare = [names[label] for label, number in sorted(counts.items()) if number < FEW_OF_A_CLASS]
        said.append(
            f"{plural(len(rare), 'class', 'classes')} with fewer than {FEW_OF_A_CLASS} pictures will not be learned: "
            f"{', '.join(rare[:NAMED])}"
        )
    if duplicates > MUCH * len(survey.sample):
        said.append("so many near duplicates make the set smaller than it looks")
    if survey.cropped > MUCH:
        said.append(f"pictures are cropped to the square in their middle, which cuts off {survey.cropped:.0%} of most")
    if survey.short_side > size:
        said.append(f"samples are {size}x{size} pixels, however large your pictures are")
    return said


def expected(images: int, count: int, classes: int) -> str:
    """What samples will be like after a training of so many images."""
    words = [text for least, text in EXPECTED if images >= least][-1]
    passes = images / count
    if count <= BY_HEART:
        return "the training pictures again"
    if passes >= OFTEN:
        return f"{words}; after {passes_over(images, count)}, many samples are near copies of them"
    if passes < 1:
        return f"{words}; there is time for {passes:.0%} of the pictures only"
    return words + (f"; a class is seen {images / classes:,.0f} times on average" if classes > 1 else "")


def afterwards(out: Path, names: Sequence[str]) -> list[str]:
    """Where to look, and how to sample."""
    label = f" --label {shlex.quote(names[0])}" if names else ""
    return [
        f"previews: {out / 'samples'}, eight times; timeline.png there shows how they change",
        f"when it is finished: seriatim sample {shlex.quote(str(out))}{label} --out samples",
    ]


def tokenizer_loss(psnr: float, tokens: int, size: int) -> str:
    if psnr >= 45:
        loss = "nothing that can be seen"
    elif psnr >= 33:
        loss = "hardly anything that can be seen"
    elif psnr >= 28:
        loss = "a little fine grain"
    else:
        loss = "fine grain and sharp edges"
    return f"pictures of {size}x{size} pixels become {tokens} tokens; that alone loses {loss} (PSNR {psnr:.1f} dB)"


def plural(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
