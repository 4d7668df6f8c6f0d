"""Generic tests that any tokenizer must pass: `check_tokenizer(MyTokenizer(...))`.

B images, c channels, H x W pixels in [-1, 1], L tokens of D features.
"""

from __future__ import annotations

import torch

from seriatim.core.keys import Keys
from seriatim.tokenizers.base import Tokenizer

B = 3


def check_tokenizer(
    tokenizer: Tokenizer, *, device: torch.device | str = "cpu", error: float | None = None, atol: float = 1e-4
) -> Tokenizer:
    """Check the contract of `tokenizers/base.py` and return the tokenizer, on `device`.

    It must have measured what it measures (`fit`). `error`, where it is given, is how far decoded pixels may be from
    the images in the mean; `atol` is what rounding may change.
    """
    name = type(tokenizer).__name__
    tokenizer.to(device).eval()
    where = torch.device(device).type
    generator = torch.Generator(device="cpu").manual_seed(0)
    shape = (B, tokenizer.channels, *tokenizer.size)
    images = torch.rand(shape, generator=generator, device="cpu") * 2 - 1  # on the host: a tokenizer moves its inputs
    L, D = tokenizer.count, tokenizer.dim
    with torch.no_grad():
        moments = tokenizer.moments(images)
        assert len(moments) == B, f"{name}.moments gives {len(moments)} rows of {B} images"
        tokens = tokenizer.tokens(moments)
        wanted = (B, L) if tokenizer.vocab is not None else (B, L, D)
        assert tokens.shape == wanted, f"{name}.tokens has shape {tuple(tokens.shape)}, not {wanted}"
        if tokenizer.vocab is not None:
            assert tokens.dtype == torch.long, f"{name}.tokens are {tokens.dtype}; codes are int64"
            inside = 0 <= int(tokens.min()) and int(tokens.max()) < tokenizer.vocab
            assert inside, f"{name}.tokens are outside 0..{tokenizer.vocab - 1}"
        else:
            assert tokens.dtype == torch.float32, f"{name}.tokens are {tokens.dtype}; features are float32"
            assert bool(torch.isfinite(tokens).all()), f"{name}.tokens are not finite"
        assert torch.equal(tokenizer.tokens(moments.cpu()), tokens), f"{name}.tokens does not move its inputs"
        with torch.autocast(where, dtype=torch.bfloat16):
            same = torch.equal(tokenizer.tokens(tokenizer.moments(images)), tokens)
        assert same, f"{name}: tokens differ under autocast; float32 means float32"
        for b in range(B):
            alone = tokenizer.tokens(tokenizer.moments(images[b : b + 1]))[0]
            assert torch.allclose(alone.float(), tokens[b].float(), atol=atol), (
                f"{name}: an image's tokens depend on others"
            )
        keys = Keys.of_seeds(range(B))
        drawn = tokenizer.tokens(moments, keys)
        assert torch.equal(drawn, tokenizer.tokens(moments, keys)), f"{name}.tokens differs with the same keys"
        alone = tokenizer.tokens(moments[1:2], keys.select(slice(1, 2)))[0]
        assert torch.allclose(alone.float(), drawn[1].float(), atol=atol), f"{name}: an image's draw depends on others"
        if tokenizer.pictures:
            decoded = tokenizer.decode(tokens.cpu())
            assert decoded.shape == shape, f"{name}.decode has shape {tuple(decoded.shape)}, not {shape}"
            assert bool(torch.isfinite(decoded).all()), f"{name}.decode is not finite"
            found = {t.device.type for t in (moments, tokens, decoded)}
            assert found == {where}, f"{name} gives tensors on {sorted(found)}, though it is on {where}"
            if error is not None:
                off = float((decoded.cpu() - images).abs().mean())
                assert off <= error, f"{name}: decoded pixels are off by {off:.3g} in the mean, allowed {error:.3g}"
        with torch.device("meta"):
            twin = type(tokenizer)(**tokenizer.config)
        twin.load_state_dict(tokenizer.state_dict(), assign=True)
        again = twin.eval().tokens(twin.moments(images))
        assert torch.equal(again, tokens), f"{name} rebuilt from config and weights gives other tokens"
        assert twin.fingerprint() == tokenizer.fingerprint(), f"{name}.config must be the constructor's arguments"
    return tokenizer
