"""The device that isn't there refuses, allows and counts what CUDA does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretend_cuda import DeviceError, Pretend, PretendCUDA, pretend, pretend_cuda, real
from torch import Tensor, nn


@pytest.fixture
def device() -> Iterator[PretendCUDA]:
    with pretend_cuda() as found:
        yield found


def here(line_of: Callable[..., Any]) -> str:
    return f"tests/test_pretend_cuda.py:{line_of.__code__.co_firstlineno}"


# --- what is refused and what is allowed ------------------------------------------------------------------------------

X = torch.arange(12.0).view(3, 4)
MIXED: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda x: x + X,
    "sum, the other way": lambda x: X + x,
    "product": lambda x: x @ X.T,
    "product, the other way": lambda x: X.T @ x,
    "in place": lambda x: x.mul_(X),
    "in place, the other way": lambda x: X.clone().mul_(x),
    "number of the CPU, in place": lambda x: torch.tensor(1.0).add_(x[0, 0]),
    "number of the device": lambda x: X * x[0, 0],
    "cat": lambda x: torch.cat([x, X]),
    "stack": lambda x: torch.stack([X, x]),
    "where": lambda x: torch.where(x > 1, x, X),
    "mask of where": lambda x: torch.where(X > 1, x, x),
    "masked_fill": lambda x: x.masked_fill(X > 1, 0.0),
    "embedding": lambda x: F.embedding(torch.tensor([1]), x),
    "embedding of one": lambda x: F.embedding(torch.tensor(1), x),
    "gather": lambda x: x.gather(1, torch.zeros(3, 1, dtype=torch.long)),
    "index_select": lambda x: x.index_select(0, torch.tensor([0, 2])),
    "scatter": lambda x: x.scatter(1, torch.zeros(3, 1, dtype=torch.long), 1.0),
    "index of the device": lambda _: X[pretend(torch.tensor([0, 2]))],
    "mask of the device": lambda x: X[x > 3],
    "values put": lambda x: x.index_put_((torch.tensor([0, 1]),), X[:2]),
    "linear": lambda x: F.linear(x, torch.ones(2, 4)),
    "bias": lambda x: F.linear(x, pretend(torch.ones(2, 4)), torch.ones(2)),
    "layer norm": lambda x: F.layer_norm(x, (4,), torch.ones(4)),
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], X[None, None], X[None, None]),
    "convolution": lambda x: F.conv1d(x[None], torch.ones(2, 3, 1)),
    "loss": lambda x: F.mse_loss(x, X),
    "clamp": lambda x: x.clamp(max=X),
    "searchsorted": lambda x: torch.searchsorted(x, X),
    "out": lambda x: torch.add(x, x, out=X.clone()),
    "generator": lambda _: torch.randn(3, device="cuda", generator=torch.Generator()),
    "generator, in place": lambda x: x.uniform_(generator=torch.Generator()),
    "module": lambda x: nn.Linear(4, 2)(x),
    "module on the device": lambda _: pretend(nn.Linear(4, 2))(X),
}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("call", MIXED.values(), ids=MIXED)
def test_mixed_devices_are_refused(call: Callable[[Tensor], Any]) -> None:
    with pytest.raises(
        RuntimeError, match=r"at tests/test_pretend_cuda.py:\d+: |expected|Expected .* to have the same device"
    ):
        call(pretend(X))


ALLOWED: dict[str, Callable[[Tensor], Any]] = {
    "number of the CPU": lambda x: x * torch.tensor(2.0) + torch.tensor(1),
    "number of the CPU, first": lambda x: torch.tensor(2.0) - x,
    "python number": lambda x: 3 - x / 2,
    "where": lambda x: torch.where(x > 5, x, 0.0),
    "where, number of the CPU": lambda x: torch.where(x > 5, x, torch.tensor(0.0)),
    "product": lambda x: x @ x.T,
    "in place on a view": lambda x: (x[1].mul_(2), x[:, 1:].zero_(), x)[-1],
    "in place and out": lambda x: torch.sqrt(x, out=x.clone()),
    "index of the CPU": lambda x: x[torch.tensor([2, 0])],
    "slices": lambda x: x[:, None, 1::2].flip(-1),
    "list": lambda x: x[[2, 0]] + x[:, [0]].sum(),
    "put, index of the CPU": lambda x: x.clone().index_put_((torch.tensor([1]),), torch.tensor(5.0)),
    "item set": lambda x: set_item(x.clone(), (slice(None), 1), 7.0),
    "item set by a list": lambda x: set_item(x.clone(), [0, 2], 7.0),
    "new_tensor": lambda x: x + x.new_tensor([1, 2, 3, 4]),
    "tensor": lambda x: x + torch.tensor([1, 2, 3, 4], device=x.device),
    "zeros": lambda x: torch.zeros(3, 4, device=x.device) + x.new_ones(4) + torch.full_like(x, 2),
    "arange": lambda x: x[torch.arange(3, device=x.device)],
    "dtype": lambda x: x.to(torch.int64) + x.long(),
    "layer norm, softmax, attention": lambda x: attention(F.layer_norm(x, (4,)).softmax(-1)[None, None]),
    "cumulated": lambda x: x.cumsum(0).argsort(-1) + x.topk(4).indices,
    "split": lambda x: torch.stack([part.sum() for part in x.unbind()] + [part.sum() for part in x.split(2)]),
    "bits": lambda x: (x.long() >> 1).bitwise_and_(3).view(torch.int32),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "rows added": lambda x: x.index_add(0, torch.arange(3, device=x.device), x),
    "to other": lambda x: X.to(x) + x,
    "one hot": lambda x: F.one_hot(x[0].long(), 5),
    "detached": lambda x: x.detach().data + x.view(4, 3).T,
}


def attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def set_item(x: Tensor, index: Any, value: Any) -> Tensor:
    x[index] = value
    return x


@pytest.mark.parametrize("call", ALLOWED.values(), ids=ALLOWED)
def test_what_cuda_allows_gives_what_the_cpu_gives(call: Callable[[Tensor], Any], device: PretendCUDA) -> None:
    found = call(pretend(X))
    assert isinstance(found, Pretend) and found.device == torch.device("cuda:0") and found.is_cuda
    assert device.reads == {} and device.reduced == {}
    with pretend_cuda() as none:
        expected = call(X.clone())
    assert not none.reads
    assert torch.equal(real(found), real(expected))


# --- what is counted --------------------------------------------------------------------------------------------------

READ: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0, 0].item(),
    "item, float": lambda x: float(x[0, 0]),
    "item, int": lambda x: int(x[0, 0].long()),
    "item, bool": lambda x: bool((x > 1).all()),
    "item, if": lambda x: 1 if (x > 1).any() else 2,
    "allclose": lambda x: torch.allclose(x, x),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "nonzero, where": lambda x: torch.where(x > 1),
    "boolean index": lambda x: x[x > 1],
    "boolean index, of rows": lambda x: x[:, x[0] > 1],
    "boolean index, put": lambda x: x.index_put_((x > 1,), pretend(torch.arange(10.0))),
    "masked_select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "bincount": lambda x: x[0].long().bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x[:, 0].long(), dim=0),
    "copy to the CPU": lambda x: x.cpu(),
    "copy to the CPU, to": lambda x: x.to("cpu"),
    "copy to the CPU, to with a dtype": lambda x: x.to("cpu", torch.float64, non_blocking=True),
    "copy to the CPU, copy_": lambda x: torch.empty(3, 4).copy_(x),
    "copy to the CPU, numpy": lambda x: x.numpy(force=True),
}


@pytest.mark.parametrize("name", READ)
def test_reads_are_counted_where_they_are_made(name: str, device: PretendCUDA) -> None:
    READ[name](pretend(X))
    kind = name.split(",")[0]
    assert device.reads == {f"{here(READ[name])} {kind}": 1}, "one read of this kind, on the line of the lambda"
    assert not device.copies
    device.reset()
    assert not device.reads


SENT: dict[str, Callable[[Tensor], Any]] = {
    "copy to the device": lambda _: X.to("cuda"),
    "copy to the device, to other": lambda x: X.to(x),
    "copy to the device, copy_": lambda x: x.copy_(X),
    "copy to the device, tensor": lambda _: torch.tensor([1.0, 2.0], device="cuda"),
    "copy to the device, as_tensor": lambda x: torch.as_tensor(np.ones(2), device=x.device),
    "copy to the device, new_tensor": lambda x: x.new_tensor([1.0]),
    "copy to the device, list": lambda x: x[[0, 1]],
    "index": lambda x: x[torch.tensor([0, 1])],
}


@pytest.mark.parametrize("name", SENT)
def test_copies_to_the_device_are_counted(name: str, device: PretendCUDA) -> None:
    SENT[name](pretend(X))
    assert device.copies == {f"{here(SENT[name])} {name.split(',')[0]}": 1}
    assert not device.reads


def test_what_costs_nothing_is_not_counted(device: PretendCUDA) -> None:
    x = pretend(X)
    assert x.to("cuda") is x and x.to(x.device, torch.float32) is x and x.to(pretend(X)) is x and x.cuda() is x
    x[x > 3] = 0.0  # which becomes masked_fill
    assert real(x).max() == 3
    assert x.shape == (3, 4) and len(x) == 3 and x.numel() == 12 and repr(x).startswith("Pretend(tensor(")
    assert not device.reads and not device.copies
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        np.asarray(x)


def test_products_that_are_not_float32_are_counted(device: PretendCUDA) -> None:
    x, image = pretend(X), pretend(torch.ones(1, 1, 4, 4))
    weight = pretend(torch.ones(1, 1, 3, 3))
    _ = x @ x.T
    assert not device.reduced, "TF32 is off for products, unless somebody asks for it"
    F.conv2d(image, weight)
    assert sum(device.reduced.values()) == 1, "TF32 is on for convolutions, unless somebody turns it off"
    with torch.autocast("cuda", torch.bfloat16):
        _ = x @ x.T
    assert sum(device.reduced.values()) == 2
    assert all(key.startswith("tests/test_pretend_cuda.py:") for key in device.reduced)


# --- autograd and modules ---------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch_state = torch.get_rng_state()
    torch.default_generator.manual_seed(0)
    net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 10))
    net[4].weight = net[0].weight  # tied
    torch.set_rng_state(torch_state)
    return net


def step(net: nn.Module, codes: Tensor) -> tuple[Tensor, list[Tensor]]:
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(3):
        loss = F.cross_entropy(net(codes).flatten(0, 1), codes.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
    return loss.detach(), [p.detach() for p in net.parameters()]


def test_training_gives_what_the_cpu_gives(device: PretendCUDA) -> None:
    codes = torch.arange(12).view(2, 6) % 10
    loss, weights = step(network(), codes)
    net = pretend(network())
    assert net.get_parameter("0.weight") is net.get_parameter("4.weight")
    found, others = step(net, pretend(codes))
    assert isinstance(found, Pretend) and all(isinstance(w, Pretend) for w in others)
    assert torch.allclose(real(found), loss)
    assert all(torch.allclose(real(a), b, atol=1e-6) for a, b in zip(others, weights, strict=True))
    assert not device.reads, "neither the loss nor the optimiser waits for the device"


@pytest.mark.usefixtures("device")
def test_a_gradient_goes_through_views_indices_and_a_copy_from_the_cpu() -> None:
    def run(x: Tensor, send: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = x.requires_grad_()
        y = send(leaf) if send is not pretend else leaf
        y = y.view(4, 3).T[[1, 0]][:, 1:].cumsum(1).exp().log_softmax(-1)
        y.square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    expected = run(X.clone(), lambda x: x)
    assert torch.allclose(real(run(pretend(X), pretend)), expected)
    found = run(X.clone(), lambda x: x.to("cuda"))
    assert not isinstance(found, Pretend) and torch.allclose(found, expected)


def test_modules_move_and_keep_their_weights(device: PretendCUDA) -> None:
    net = network()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.to("cuda")
    assert all(isinstance(p, Pretend) and isinstance(p, nn.Parameter) for p in net.parameters())
    assert sum(device.copies.values()) == len(list(net.parameters()))
    for tensor in net.parameters():
        tensor.data.zero_()
    net.load_state_dict(state)
    assert all(isinstance(tensor, Pretend) for tensor in net.state_dict().values())
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.get_parameter("1.bias").fill_(9.0)
    assert float(real(net.get_parameter("1.bias").detach()).max()) < 9
    net.to("cpu")
    assert not any(isinstance(p, Pretend) for p in net.parameters())
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.usefixtures("device")
def test_versions_count_writes_through_views() -> None:
    x = pretend(X)
    before = x._version
    x[1, 2:].zero_()
    assert x._version == before + 1


def test_a_device_without_float64() -> None:
    with pretend_cuda(float64=False) as device:
        x = pretend(X)
        assert (x * 2.0).dtype == torch.float32 and x.cpu().double().dtype == torch.float64
        for call in (lambda: x.double(), lambda: X.double().to("cuda"), lambda: torch.zeros(2, device="cuda").double()):
            with pytest.raises(DeviceError, match="this device has no float64"):
                call()
        with pytest.raises(DeviceError, match="this device has no float64"):
            pretend(X.double())
        assert device.reads


def test_nothing_is_left_behind() -> None:
    before = torch.tensor, torch.as_tensor, torch.cuda._lazy_init, torch.cuda.is_bf16_supported
    with pretend_cuda():
        x = pretend(X)
    assert before == (torch.tensor, torch.as_tensor, torch.cuda._lazy_init, torch.cuda.is_bf16_supported)
    assert not torch.__future__.get_swap_module_params_on_conversion()
    with pytest.raises(AssertionError, match="inside `with pretend_cuda"):
        _ = x + 1
    assert torch.equal(real(x), X)
