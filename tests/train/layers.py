"""Small models of every kind of layer, and examples of every training method."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dither.train
from dither import LSQ, Affine, Product, Run, SpecError, attach, load_into
from dither.core import Encoder
from dither.train import Cyclical, Gradual, Iterative, OneShot
from dither.train.method import METHODS, Method

Spec = Encoder | Method


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.rnn = kind(8, 16, batch_first=True, **settings)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return out


class Attention(nn.Module):
    """Self-attention reads `in_proj_weight`; with other widths, three weights."""

    def __init__(self, width: int | None = None, *, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            16, 4, kdim=width, vdim=width, batch_first=batch_first
        )
        self.width = width or 16

    def forward(self, x: Tensor) -> Tensor:
        other = x[..., : self.width]
        out: Tensor = self.attention(x, other, other)[0]
        return out


class Text(nn.Module):
    def __init__(self, layers: int = 1, **settings: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, **settings)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.embed = nn.Embedding(20, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 0)
        return out * (tokens != 0).unsqueeze(-1)


class Projection(nn.Module):
    """GPT-2's: the weight is (in, out)."""

    def __init__(self, wide: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(wide, out) * 0.1)
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)


class Experts(nn.Module):
    """Mixture of experts: one 3-D parameter holds all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 8) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(4, 8, 8) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.gate_up_proj.transpose(1, 2))[..., :8] @ self.down_proj


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(tokens))
        return out


class Functional(nn.Module):
    """Reads a child's weight itself: only `owners` tells."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.emb(tokens), self.emb.weight)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(16, 16)
        self.again = self.one

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again(torch.relu(self.one(x)))
        return out


class Listed(nn.Module):
    """Parameters in a list, which has no forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(16, 16) * 0.2 for _ in range(2)])
        self.named = nn.ParameterDict({"last": torch.randn(8, 16) * 0.2})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.relu(x @ weight)
        return F.linear(x, self.named["last"])


def _norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())


def _reals(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def _tokens(*shape: int) -> Callable[[], Tensor]:
    def make() -> Tensor:
        tokens = torch.randint(1, 20, shape)
        tokens[1:, -2:] = 0
        return tokens

    return make


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)),
        _reals(5, 16),
    ),
    "conv1d": (lambda: nn.Conv1d(8, 8, 3), _reals(2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), _reals(2, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 8, 2), _reals(2, 2, 4, 4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(8, 4, 3, stride=2), _reals(2, 8, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(8, 4, 3), _reals(2, 8, 4, 4)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 2, 2), _reals(2, 4, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(20, 16, padding_idx=0), _tokens(3, 6)),
    "bag": (lambda: nn.EmbeddingBag(20, 16, padding_idx=0), _tokens(3, 6)),
    "lstm": (lambda: Recurrent(nn.LSTM), _reals(2, 5, 8)),
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2), _reals(2, 5, 8)),
    "attention": (Attention, _reals(2, 5, 16)),
    "attention, other widths": (lambda: Attention(8), _reals(2, 5, 16)),
    "encoder": (Text, _tokens(3, 6)),
    "projection": (lambda: Projection(16, 8), _reals(5, 16)),
    "experts": (Experts, _reals(4, 5, 8)),
    "tied": (Tied, _tokens(3, 6)),
    "functional": (Functional, _tokens(3, 6)),
    "twice": (Twice, _reals(5, 16)),
    "listed": (Listed, _reals(5, 16)),
    "batch norm": (_norm, _reals(3, 3, 6, 6)),
    "bfloat16": (lambda: nn.Linear(16, 8).bfloat16(), lambda: torch.randn(5, 16).bfloat16()),
}
"""By kind: a model and its input."""

OWNERS = {"functional": {"emb.weight": ""}}


def build(kind: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A model with weights by the seed, and the one input of its kind."""
    make, inputs = MODELS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        torch.manual_seed(5)
        return model, inputs()


def weights_of(model: nn.Module) -> list[str]:
    """Names of what is worth quantizing: everything but vectors."""
    return [n for n, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1]


def attached(kind: str, spec: Spec, seed: int = 0, **settings: Any) -> tuple[Run, Tensor]:
    """A run on a model of a kind, with one spec for all its matrices."""
    model, inputs = build(kind, seed)
    plan = dither.train.Plan(dict.fromkeys(weights_of(model), spec), OWNERS.get(kind, {}))
    return attach(model, plan, **settings), inputs


def train(run: Run, inputs: Tensor, steps: int = 2, lr: float = 0.05) -> list[float]:
    """A few steps on a loss that every model has; returns the losses."""
    run.model.train()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=lr)
    run.join(optimizer)
    losses = []
    for _ in range(steps):
        loss = run.model(inputs).float().square().mean() + 1e-6 * run.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """What a model says in evaluation."""
    out: Tensor = model.eval()(inputs)
    return out


def load_and_evaluate(folder: str, threads: str) -> None:
    """In a fresh process: what every file of a folder computes in a model made anew."""
    torch.set_num_threads(int(threads))
    results = {}
    for path in sorted(Path(folder).glob("*.dither")):
        model, inputs = build(path.stem.split("@")[0], seed=1)
        load_into(model, path)
        results[path.stem] = outputs(model, inputs)
    torch.save(results, Path(folder) / "results.pt")


# --- methods -------------------------------------------------------------------------------------


def _known() -> Mapping[str, tuple[Method, ...]]:
    for module in pkgutil.iter_modules(dither.train.__path__):
        importlib.import_module(f"dither.train.{module.name}")
    examples: dict[str, tuple[Method, ...]] = {
        "lsq": (LSQ(4), LSQ(bits=None), LSQ(3, axis=0), LSQ(4, group=8), LSQ(2, learn=False)),
    }
    makers: dict[str, Callable[[Callable[..., Method]], tuple[Method, ...]]] = {
        "learned_codebook": lambda make: (make(), make(points=4, train_weights=True)),
        "straight_through": lambda make: (
            make(Affine(4)),
            make(Affine(4, grid="endpoint", group=8), stochastic=True),
        ),
        "diffq": lambda make: (
            make(),
            make(group=0),
            make(group=7, noise="uniform", param="noise"),
        ),
        "bayesian_bits": lambda make: (make(), make(max_bits=8, prune=True)),
        "pruned": lambda make: (
            make(LSQ(4), Gradual(0.75)),
            make(LSQ(None), Cyclical(0.5, cycles=2), refresh=1),
            make(Affine(4), OneShot(0.5), pattern="2:4"),
            make(LSQ(4), Iterative(0.5, rounds=2), pattern="channels", refresh=1),
            make(LSQ(None), refresh=1),
        ),
        "learned_factors": lambda make: (make(3, 0.5, 6, 4), make(rank=2, density=1.0)),
        "dead_zone": lambda make: (make(None, zone=2.5), make(4, axis=0, zone=1.5)),
        "product_codes": lambda make: (make(Product(4, points=16)),),
        "quant_noise": lambda make: (
            make(Affine(8), p=0.5),
            make(Affine(4, axis=0), p=0.5, kind="proxy", block=4),
        ),
    }
    for name, kind in METHODS.items():
        if kind.__module__.startswith("dither.") and name not in examples:
            maker = makers.get(name, _plainest)
            examples[name] = maker(kind)
    return examples


def _plainest(make: Callable[..., Method]) -> tuple[Method, ...]:
    try:
        return (make(),)
    except TypeError:
        return ()  # a test names it


EXAMPLES = _known()
"""By name of the method: specs to try. A method that needs settings has a line in `makers`."""

METHOD_SPECS: list[Spec] = [spec for specs in EXAMPLES.values() for spec in specs]
SPECS: list[Spec] = [Affine(4), *METHOD_SPECS]


def accepts(kind: str, spec: Spec) -> bool:
    """Whether a spec takes the weights of a kind of model: it may refuse shapes."""
    try:
        attached(kind, spec)
    except SpecError:
        return False
    return True
