"""Tuning: numbers of a file that take no bytes learn, codes stay, and it is never worse."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from dither import Affine, Codebook, Product, Raw, SpecError, Trellis
from dither.archive import Archive, pack
from dither.calibrate.tuning import Scales, Student, judged, part_of
from dither.core import Encoded, Format
from dither.data import divergence
from dither.demo.network import load_digits
from dither.model import collect, evaluating
from dither.search import Course
from dither.search.held_out import hold_out
from tests.train.layers import MODELS, build


class Words(nn.Module):
    """A tiny transformer whose output layer is its token table."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(48, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.output = nn.Linear(16, 48, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.output(self.norm(self.layer(self.embedding(tokens))))
        return logits


@dataclass(frozen=True)
class Made:
    """A trained model, a file of it made with samples, those samples, and others."""

    model: nn.Module
    archive: Archive
    data: dither.Data
    others: Tensor

    def distance(self, archive: Archive) -> float:
        """On samples that nothing was fitted to, loaded from the file's bytes."""
        model = copy.deepcopy(self.model)
        dither.load_into(model, Archive.from_bytes(archive.to_bytes()))
        with torch.no_grad():
            return float(divergence(model(self.others), self.model(self.others)))


def trained(model: nn.Module, inputs: Tensor, goal: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(steps):
        some = slice(64 * (step % (len(inputs) // 64)), 64 * (step % (len(inputs) // 64) + 1))
        logits = model.train()(inputs[some])
        optimizer.zero_grad()
        functional.cross_entropy(logits.flatten(0, -2), goal[some].flatten()).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


def digits() -> Made:
    images, labels = load_digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3, bias=False),
        nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten(), nn.Linear(384, 10),
    )  # fmt: skip
    trained(model, images[:1024], labels[:1024], 60)
    data = dither.Data(list(images[:256].split(32)), distance=divergence)
    return Made(model, dither.compress(model, "26x", data=data), data, images[1024:])


def words() -> Made:
    torch.manual_seed(0)
    rows = torch.randint(48, (256, 1)) + torch.arange(13) * torch.randint(1, 4, (256, 1))
    tokens = rows % 48
    model = trained(Words(), tokens[:, :-1], tokens[:, 1:], 80)
    data = dither.Data(list(tokens[:128, :-1].split(32)), distance=divergence)
    return Made(model, dither.compress(model, "10x", data=data), data, tokens[128:, :-1])


@pytest.fixture(scope="module", params=[digits, words], ids=["digits", "words"])
def made(request: pytest.FixtureRequest) -> Made:
    if request.param is digits:
        pytest.importorskip("sklearn", reason="NEEDS scikit-learn")
    found: Made = request.param()
    return found


def test_outputs_are_nearer_at_the_same_bytes(made: Made) -> None:
    """On samples that neither search nor tuning saw; codes of matrices are the same."""
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    tuned = dither.tune(made.model, made.archive, made.data)
    assert tuned.nbytes <= made.archive.nbytes
    assert made.distance(tuned) < 0.95 * made.distance(made.archive)
    changed = 0
    for name, entry in made.archive.entries.items():
        old, new = made.archive.encoded(name), tuned.encoded(name)
        assert (new.format, new.shape, new.dtype) == (old.format, old.shape, old.dtype)
        if len(entry.shape) > 1 or name not in dict(made.model.named_parameters()):
            for part, codes in old.codes.items():
                assert torch.equal(codes.values, new.codes[part].values), name
        changed += not torch.equal(made.archive[name], tuned[name])
    assert changed > 3
    assert dict(tuned.aliases) == dict(made.archive.aliases)
    after = made.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.requires_grad and p.grad is None for p in made.model.parameters())


def test_the_file_is_what_was_judged_and_the_seed_says_which(made: Made, tmp_path: Path) -> None:
    course = Course(passes=3, seed=5)
    tuned = dither.tune(made.model, made.archive, made.data, course=course)
    again = dither.tune(made.model, made.archive, made.data, course=course)
    assert tuned.to_bytes() == again.to_bytes()
    trial: Any = tuned.trials[-1]
    assert (trial.stage, trial.kept, trial.nbytes) == ("tuned", True, tuned.nbytes)
    tuned.save(tmp_path / "tuned.dither")
    model = copy.deepcopy(made.model)
    dither.load_into(model, tmp_path / "tuned.dither")
    judge = hold_out(made.model, made.data.held(), many=sys.maxsize).judge
    with torch.no_grad():
        each = [float(divergence(model(batch), made.model(batch))) for batch in judge]
    assert trial.distance == pytest.approx(sum(each) / len(each), rel=1e-6)


@pytest.mark.parametrize("rate", [3.0, 300.0])
def test_what_was_made_no_better_comes_back_as_it_was(made: Made, rate: float) -> None:
    tuned = dither.tune(made.model, made.archive, made.data, course=Course(passes=1, rate=rate))
    assert tuned is made.archive
    trial: Any = tuned.trials[-1]
    assert not trial.kept


def test_fewer_bytes_are_kept_to_as_well(made: Made) -> None:
    for share in (0.999, 0.99, 0.5):
        room = round(share * made.archive.nbytes)
        tuned = dither.tune(made.model, made.archive, made.data, nbytes=room, course=Course(2))
        assert tuned is made.archive or tuned.nbytes <= room


def test_one_call_tunes_too(made: Made) -> None:
    size = made.archive.nbytes + 20
    plainly = dither.compress(made.model, size, data=made.data)
    tuned = dither.compress(made.model, size, data=made.data, tune=True)
    trial: Any = tuned.trials[-1]
    assert trial.stage == "tuned"
    assert trial.kept
    assert tuned.nbytes <= size
    assert made.distance(tuned) < made.distance(plainly)
    assert len(tuned.trials) == len(plainly.trials) + 1


FORMATS: list[Format] = [
    Affine(None),
    Affine(None, axis=0, scale_dtype=torch.bfloat16),
    Affine(4, group=8),
    Affine(4, grid="asymmetric"),
    Affine(3, grid="endpoint"),
    Trellis(),
    Codebook(8),
    Codebook(8, bucket=32),
    Product(4, points=16),
    Raw(torch.float16),
]


STUDENTS = [(kind, FORMATS[1]) for kind in MODELS]
STUDENTS += [(kind, fmt) for kind in ("linear", "tied", "lstm") for fmt in FORMATS]


@pytest.mark.parametrize(("kind", "fmt"), STUDENTS, ids=str)
def test_a_student_reads_the_file_wherever_the_model_reads_weights(kind: str, fmt: Format) -> None:
    """Before it learns, outputs are the file's; what it learned is what a file then holds.

    Gradients reach every part that is read.
    """
    model, inputs = build(kind)
    found = collect(model)
    tensors: dict[str, Encoded] = {}
    for name, value in found.values.items():
        is_vector = value.ndim < 2 or not value.is_floating_point()
        tensors[name] = (Raw() if is_vector else fmt).encode(value)
    dither.load_into(model, pack(tensors, found.aliases))
    student = Student(copy.deepcopy(model), tensors)
    with evaluating(model), evaluating(student.model):
        with torch.no_grad():
            wanted = model(inputs)
        student.show()
        outputs = student.model(inputs)
        torch.testing.assert_close(outputs, wanted)  # kernels differ with what asks for gradients
    if not student.parts:
        assert fmt in {Affine(3, grid="endpoint"), Codebook(8, bucket=32), Raw(torch.float16)}
        return
    outputs.float().square().mean().backward()
    learned = [part.learned for part in student.parts.values()]
    assert any(value.grad is not None and bool(value.grad.any()) for value in learned)
    with torch.no_grad():
        for value in learned:
            value.add_(0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    for name, part in student.parts.items():
        stored, shown = part.encoded().decode(), part.value().detach().to(tensors[name].dtype)
        torch.testing.assert_close(stored, shown)


def test_equal_steps_of_rows_stay_equal() -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    fmt = Affine(None, axis=0, scale_dtype=torch.bfloat16)
    scale = torch.tensor([0.25, 0.5, 0.25, 0.5, 0.25, 1.0])
    part = Scales(fmt.assign(weight, {"scale": scale}), fmt.grouping((6, 8)))
    assert part.learned.shape == (3,)
    with torch.no_grad():
        part.learned.copy_(torch.tensor([0.1, 0.0, -0.1]))
    found = part.encoded().params["scale"].float()
    assert found[0] == found[2] == found[4] > 0.25
    assert found[1] == found[3] == 0.5
    assert found[5] < 1.0


def without_gradient(output: object, original: object) -> Tensor:
    assert isinstance(output, Tensor)
    assert isinstance(original, Tensor)
    return (output.argmax(-1) != original.argmax(-1)).double().mean()


@pytest.mark.parametrize(
    ("how", "match"),
    [("distance", "no gradient|there is none"), ("sites", "quantizes activations"),
     ("attached", "attached"), ("other", "nothing that can be tuned")],
)  # fmt: skip
def test_what_cannot_be_tuned_is_said(how: str, match: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    batches = list(torch.randn(4, 16, 32))
    sites = "int8" if how == "sites" else None
    archive = dither.compress(model, "6x", data=batches, activations=sites)
    data = dither.Data(batches)
    if how == "distance":
        data = dither.Data(batches, distance=without_gradient)
    elif how == "attached":
        dither.attach(model, {"0.weight": dither.LSQ(4)})
    elif how == "other":
        model = nn.Flatten()
        archive = pack({})
    with pytest.raises(SpecError, match=match):
        dither.tune(model, archive, data)


def test_tune_in_the_one_call_needs_data_and_a_known_name() -> None:
    weights = {"w": torch.randn(64, 64)}
    with pytest.raises(SpecError, match="tune= goes with data="):
        dither.compress(weights, "8x", tune=True)
    dither.compress(weights, "8x", tune=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tunes'"):
        dither.compress(weights, "8x", tunes=True)  # type: ignore[call-arg]


def test_judging_is_by_the_mean_over_batches(made: Made) -> None:
    tensors = {name: made.archive.encoded(name) for name in made.archive.entries}
    student = Student(copy.deepcopy(made.model), tensors)
    dither.load_into(student.model, made.archive, strict=False)
    with torch.no_grad():
        wanted = [made.model(batch) for batch in made.data]
    tuned = copy.deepcopy(made.model)
    dither.load_into(tuned, made.archive)
    with torch.no_grad():
        each = [float(divergence(tuned(b), w)) for b, w in zip(made.data, wanted, strict=True)]
    found = judged(student, made.data, list(wanted))
    assert found == pytest.approx(sum(each) / len(each), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("points", [256, 1024])
def test_values_are_looked_up_in_tables_whose_type_counts_so_far(
    dtype: torch.dtype, points: int
) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    held = Codebook(points, dtype=dtype).encode(weight)
    part = part_of(held)
    if dtype == torch.bfloat16 and held.params["points"].numel() > 256:
        assert part is None
    else:
        assert part is not None
        assert torch.equal(part.value().detach(), held.decode())
