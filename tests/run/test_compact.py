"""Models whose weights stay packed: the same numbers, copies, threads, and what is kept."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import dither
from dither import Activation, Affine, CheckpointError, Raw, Trellis
from dither.activations import observe
from dither.archive import Archive, load_into, pack
from dither.core import Format
from dither.model import collect
from dither.run import compact, packed_weights


class Several(nn.Module):
    """Layers that read their weights in different ways, with a table that is the head too."""

    def __init__(self, *, is_normed: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(128, 64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.gru = nn.GRU(64, 64, num_layers=2, batch_first=True, bidirectional=True)
        self.conv = nn.Conv1d(128, 64, 3, padding=1)
        self.norm = nn.BatchNorm1d(64)
        self.linear = nn.Linear(64, 64)
        if is_normed:
            parametrizations.weight_norm(self.linear)
        self.head = nn.Linear(64, 128, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.norm(self.conv(self.gru(x)[0].mT)).mT
        made: Tensor = self.head(torch.relu(self.linear(x)))
        return made


IDS = torch.arange(24).reshape(2, 12)


def several(seed: int = 0, *, is_normed: bool = True) -> Several:
    torch.manual_seed(seed)
    return Several(is_normed=is_normed).eval()


def packed(model: nn.Module, fmt: Format) -> Archive:
    tensors = collect(model)
    return pack(
        {n: (fmt if v.ndim > 1 else Raw()).encode(v) for n, v in tensors.values.items()},
        tensors.aliases,
    )


@pytest.fixture(scope="module")
def archive() -> Archive:
    return packed(several(), Affine(4, axis=0))


@pytest.fixture(scope="module")
def expected(archive: Archive) -> Tensor:
    model = several(1)
    load_into(model, archive)
    with torch.no_grad():
        output: Tensor = model(IDS)
    return output


@pytest.mark.parametrize("keep", [0, None, 10**9])
def test_outputs_are_those_of_the_dense_model(
    archive: Archive, expected: Tensor, keep: int | None
) -> None:
    model = several(1)
    assert compact(model, archive, keep) is model
    weights = packed_weights(model)
    assert weights is not None
    with torch.no_grad():
        first, second = model(IDS), model(IDS)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert weights.kept <= weights.keep
    packed_names = (
        len(archive.entries)
        - len(dict(model.named_parameters()))
        - len([name for name, _ in model.named_buffers()])
    )
    if keep == 10**9:
        assert weights.decodings == packed_names
    if keep == 0:
        assert weights.decodings >= 2 * packed_names
        assert weights.kept == 0


@pytest.mark.parametrize("fmt", [Trellis(axis=0), Affine(8, group=32)], ids=repr)
def test_any_format(fmt: Format) -> None:
    archive, model = packed(several(), fmt), several(1)
    load_into(model, archive)
    with torch.no_grad():
        assert torch.equal(compact(several(2), archive)(IDS), model(IDS))


def test_a_model_on_the_meta_device_is_never_whole(archive: Archive, expected: Tensor) -> None:
    with torch.device("meta"):
        model = Several().eval()
    compact(model, archive)
    with torch.no_grad():
        assert torch.equal(model(IDS), expected)


def test_state_dicts_have_numbers_under_the_models_names(archive: Archive) -> None:
    model, dense = compact(several(1), archive), several(2)
    state = model.state_dict()
    assert state.keys() == dense.state_dict().keys()
    dense.load_state_dict(state)
    assert all(torch.equal(state[name], value) for name, value in archive.items())
    with pytest.raises(RuntimeError, match=r"table\.weight is packed in memory.*plain model"):
        model.load_state_dict(state)
    assert "table.weight" not in dict(model.named_parameters())
    assert "gru.bias_hh_l0" in dict(model.named_parameters())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_share_or_carry_the_packed_bytes(how: str) -> None:
    model = several(is_normed=False)  # torch refuses to pickle what is parametrized
    compact(model, packed(model, Affine(4, axis=0)))
    with torch.no_grad():
        expected = model(IDS)
        if how == "deepcopy":
            made = copy.deepcopy(model)
        elif how == "pickle":
            made = pickle.loads(pickle.dumps(model))
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            made = torch.load(buffer, weights_only=False)
        weights, before = packed_weights(made), packed_weights(model)
        assert weights is not None
        assert weights is not before
        assert torch.equal(made(IDS), expected)
    assert weights.kept <= weights.keep


def test_threads_share_what_is_kept(archive: Archive, expected: Tensor) -> None:
    model = compact(several(1), archive, 60_000)

    def run(_: int) -> Tensor:
        with torch.no_grad():
            made: Tensor = model(IDS)
        return made

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(made, expected) for made in pool.map(run, range(12)))
    weights = packed_weights(model)
    assert weights is not None
    assert 0 < weights.kept <= 60_000


def test_weights_follow_the_model_to_another_type(archive: Archive) -> None:
    model, dense = compact(several(1), archive).double(), several(2)
    load_into(dense, archive)
    with torch.no_grad():
        assert torch.equal(model(IDS), dense.double()(IDS))


def test_gradients_reach_what_is_no_weight(archive: Archive) -> None:
    model = compact(several(1), archive)
    with torch.inference_mode():
        model(IDS)  # what it keeps is read again below
    model(IDS).sum().backward()
    assert all(value.grad is not None for value in model.parameters())


def test_sites_come_with_the_archive() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(64, 128)).eval(), torch.randn(3, 64)
    tensors = {n: Affine(8).encode(v) for n, v in collect(model).values.items()}
    sites = observe(model, {"0@in": Activation(3)}, [batch])
    archive = pack(tensors, sites=sites.to_json())
    dither.activations.apply(model, sites)
    load_into(model, archive)
    made = compact(nn.Sequential(nn.Linear(64, 128)).eval(), archive)
    assert torch.equal(made(batch), model(batch))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Linear(64, 64)), "0.bias are missing"),
        (nn.Sequential(nn.Linear(64, 63, bias=False)), "0.weight are of another shape"),
        (nn.ModuleDict({"a": nn.Linear(64, 64, bias=False)}), "a.weight are missing"),
    ],
)
def test_what_does_not_fit_changes_nothing(model: nn.Module, why: str) -> None:
    archive = packed(nn.Sequential(nn.Linear(64, 64, bias=False)), Affine(4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=why):
        compact(model, archive)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert packed_weights(model) is None
