"""Models in whatever state users have them: default types, inference mode, wrappers, locks."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import dither
from dither.encoders import GPTQ, Viterbi
from dither.model import duplicate
from dither.search import priors


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    ).eval()


BATCH = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
STAGES = ["data-free", "calibrated", "calibrated, in sequence"]


def works(model: nn.Module, batch: Tensor = BATCH) -> dither.Archive:
    archive = dither.compress(model, "8x", data=[batch])
    stages = [str(trial)[:28].rstrip() for trial in archive.trials]
    assert stages[:3] == STAGES  # and the best of them anew, where samples are few
    assert not [trial for trial in archive.trials if "failed" in str(trial)]
    return archive


def same(one: dither.Archive, other: dither.Archive) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


def test_the_default_type_changes_nothing(default: torch.dtype) -> None:
    model = made()
    expected, plain = works(model), dither.compress(model, "8x")
    torch.set_default_dtype(default)
    assert same(works(model), expected)
    assert same(dither.compress(model, "8x"), plain)


@pytest.mark.parametrize("encoder", [GPTQ(0.3), Viterbi(0.3)], ids=lambda e: type(e).__name__)
def test_encoders_do_not_ask_for_the_default_type(
    encoder: GPTQ | Viterbi, default: torch.dtype
) -> None:
    weight = torch.randn(32, 32)
    stats = dither.core.Stats(gram=torch.eye(32) + 0.1)
    expected = encoder.encode(weight, stats).decode()
    torch.set_default_dtype(default)
    assert torch.equal(encoder.encode(weight, stats).decode(), expected)


def test_inference_mode_changes_nothing_and_leaves_nothing_behind() -> None:
    expected = works(made())
    with torch.inference_mode():
        model, batch = made(), BATCH.clone()
        assert same(works(model, batch), expected)
    assert same(works(model, batch), expected)
    assert same(works(made()), expected)
    assert dither.load_into(model, expected).exact
    assert torch.equal(model.state_dict()["0.weight"], expected["0.weight"])


def test_prior_moments_live_as_long_as_they_are_used() -> None:
    with torch.inference_mode():
        gram = priors.prior_gram(torch.randn(5, 7, 3, 3))
    assert gram is not None
    assert not gram.is_inference()
    assert priors.prior_gram(torch.randn(9, 7, 3, 3)) is gram
    count = len(priors._GRAMS)
    del gram
    assert len(priors._GRAMS) == count - 1


def compiled(model: nn.Module) -> nn.Module:
    wrapped: object = torch.compile(model)
    assert isinstance(wrapped, nn.Module)
    return wrapped


def partly_compiled(model: nn.Sequential) -> nn.Module:
    model.register_module("4", compiled(model[4]))
    return model


WRAPPERS: list[Callable[[nn.Sequential], nn.Module]] = [
    *(compiled, nn.DataParallel, AveragedModel, partly_compiled),
    lambda model: AveragedModel(compiled(model)),
]


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("wrap", WRAPPERS, ids=["compile", "parallel", "average", "part", "both"])
def test_a_wrapped_model_loads_back_into_the_plain_one(
    wrap: Callable[[nn.Sequential], nn.Module],
) -> None:
    expected = dither.compress(made(), "8x")
    archive = dither.compress(wrap(made()), "8x")
    assert same(archive, expected) or wrap is partly_compiled
    for source in (archive, dither.compress(wrap(made()).state_dict(), "8x"), expected):
        for target in (made(), wrap(made())):
            assert dither.load_into(target, source).exact
            value = next(v for n, v in target.state_dict().items() if n.endswith("0.weight"))
            held = next(source[name] for name in source if name.endswith("0.weight"))
            assert torch.equal(value, held)


def old_weight_norm(model: nn.Sequential) -> None:
    nn.utils.weight_norm(model[0])
    model(BATCH)


def pruned(model: nn.Sequential) -> None:
    prune.l1_unstructured(model[4], "weight", 0.5)
    model(BATCH)


def lock(model: nn.Sequential) -> None:
    model[0].lock = threading.Lock()  # type: ignore[assignment]


def generator(model: nn.Sequential) -> None:
    model.left = (i for i in range(3))  # type: ignore[assignment]


def in_a_dict(model: nn.Sequential) -> None:
    model.kept = {"lock": threading.Lock()}  # type: ignore[assignment]


def open_file(model: nn.Sequential) -> None:
    model.log = Path(__file__).open()  # type: ignore[assignment]  # noqa: SIM115


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [old_weight_norm, pruned, lock, generator, in_a_dict, open_file],
    ids=lambda c: c.__name__,
)
def test_models_that_deepcopy_refuses_are_compressed_with_data(
    change: Callable[[nn.Sequential], None],
) -> None:
    model = made()
    change(model)
    expected = model(BATCH)
    works(model)
    assert torch.equal(model(BATCH), expected)
    copied = duplicate(model)
    assert torch.equal(copied(BATCH), expected)
    mine = {value.data_ptr() for value in model.state_dict().values()}
    assert mine.isdisjoint(value.data_ptr() for value in copied.state_dict().values())
    if change is open_file:
        model.log.close()  # type: ignore[operator, union-attr]


def test_what_cannot_be_copied_at_all_is_refused_with_what_to_do() -> None:
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo: object) -> "Stubborn":
            raise RuntimeError("never")

    with pytest.raises(dither.SpecError, match=r"cannot be copied \(never\).*__deepcopy__"):
        duplicate(nn.Sequential(Stubborn(2, 2)))
