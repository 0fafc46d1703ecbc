"""Adapters of PEFT: compressed, trained, and put on a base again, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dither
from dither import LSQ
from dither.core import CheckpointError
from dither.testing import same_bits
from tests.test_hf_folders import LLAMA, build, place, run

pytest.importorskip("transformers", reason="NEEDS transformers: install dither[hf]")
peft = pytest.importorskip("peft", reason="NEEDS peft")

from dither.integrations.peft import (  # noqa: E402
    ADAPTER,
    adapter_archive,
    from_pretrained,
    save_pretrained,
)

__all__ = ["place"]

SETTINGS: dict[str, Any] = {
    "lora": {"r": 8},
    "dora": {"r": 8, "use_dora": True},
    "with a head": {"r": 8, "modules_to_save": ["lm_head"]},
}


def base() -> Any:  # noqa: ANN401 - of an optional package
    return build("LlamaForCausalLM", LLAMA)


def adapted(case: str) -> Any:  # noqa: ANN401 - the same
    torch.manual_seed(1)
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], init_lora_weights=False, **SETTINGS[case]
    )
    return peft.get_peft_model(base(), config).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:  # noqa: ANN401 - the same
    found: Tensor = model(torch.arange(12).reshape(2, 6)).logits
    return found


@pytest.mark.parametrize("case", SETTINGS)
def test_an_adapter_comes_back_with_the_archives_numbers(case: str, place: Path) -> None:
    model = adapted(case)
    model.save_pretrained(place / "adapter")
    run("compress", "adapter", "--size", "4x", "-o", "small/")
    assert not list((place / "small").glob("adapter_model.safetensors"))
    dense = (place / "adapter" / "adapter_model.safetensors").stat().st_size
    assert (place / "small" / ADAPTER).stat().st_size <= dense / 4
    read = from_pretrained(base(), place / "small")
    peft.set_peft_model_state_dict(model, dither.load(place / "small" / ADAPTER))
    assert same_bits(logits(read), logits(model))
    assert not any(parameter.requires_grad for parameter in read.parameters())
    archive = dither.compress(peft.get_peft_model_state_dict(model), "4x")
    assert save_pretrained(archive, place / "again", model) == archive.nbytes + 128
    again = from_pretrained(base(), place / "again", is_trainable=True)
    assert any(parameter.requires_grad for parameter in again.parameters())


def test_an_adapter_is_trained_on_a_frozen_base(place: Path) -> None:
    model = adapted("lora")
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" not in n}
    attached = dither.attach(model, {"*lora_*": LSQ(4)})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    attached.join(optimizer)
    tokens = torch.arange(12).reshape(2, 6)
    for _ in range(3):
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        attached.step()
    attached.finish()
    save_pretrained(adapter_archive(attached), place / "small", model)
    read = from_pretrained(base(), place / "small")
    assert same_bits(logits(read), logits(model.eval()))
    assert all(same_bits(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_what_does_not_fit_is_never_drawn_at_random(place: Path) -> None:
    model = adapted("lora")
    model.save_pretrained(place / "adapter")
    with pytest.raises(CheckpointError, match="is it one of peft's own"):
        from_pretrained(base(), place / "adapter")
    state = peft.get_peft_model_state_dict(model)
    lost = next(iter(state))
    less = {name: value for name, value in state.items() if name != lost}
    save_pretrained(dither.compress(less, "2x"), place / "a", model)
    with pytest.raises(CheckpointError, match=r"lacks .*lora_A"):
        from_pretrained(base(), place / "a")
    more = state | {"odd.lora_A.weight": state[lost]}
    save_pretrained(dither.compress(more, "2x"), place / "b", model)
    with pytest.raises(CheckpointError, match=r"has no .*odd"):
        from_pretrained(base(), place / "b")
    with pytest.raises((ValueError, OSError)):
        peft.PeftModel.from_pretrained(base(), str(place / "a"))
