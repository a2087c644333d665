"""In which numbers is multiplied: what is refused, and float8 where it is emulated."""

import sys

import pytest
import torch
from conftest import text_only
from test_objectives import make_batch, make_model, make_sample

from multimodal_fm.batch import Example
from multimodal_fm.errors import UserError
from multimodal_fm.train.config import build
from multimodal_fm.train.precision import convert_to_float8, set_precision


def test_float8_is_refused_in_one_line_where_it_cannot_be(tmp_path, corpus, monkeypatch):
    with pytest.raises(UserError, match="round_to is a multiple of 16 with precision: float8"):
        build(text_only(corpus, tmp_path, precision="float8", round_to=8))
    assert build(text_only(corpus, tmp_path, precision="float8", round_to=128)).precision == "float8"
    model = make_model()
    with pytest.raises(UserError, match="float8 needs a GPU of the Ada or Hopper kind or newer, not cpu"):
        set_precision(model, "float8", torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match="needs torchao: pip install"):
        convert_to_float8(model)


def test_a_cpu_keeps_its_precision():
    before = torch.get_float32_matmul_precision()
    set_precision(make_model(), "bfloat16", torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.slow
def test_float8_keeps_names_and_nearly_the_results():
    """Emulated in float32: the parameters are the same tensors under the same names, and gradients reach them."""
    pytest.importorskip("torchao")
    model = make_model(width=64)
    batch = make_batch([Example(list(make_sample(text=16).tokens.values()), [None]) for _ in range(2)])
    with torch.no_grad():
        before = model(batch).tokens.content
    names = {name: id(weight) for name, weight in model.named_parameters()}
    converted = convert_to_float8(model, emulate=True)
    assert "0.attention.project_in" in converted and len(converted) >= 2 * 3
    assert {name: id(weight) for name, weight in model.named_parameters()} == names
    after = model(batch).tokens.content
    assert 0 < float((after.detach() - before).norm() / before.norm()) < 0.1
    after.square().mean().backward()
    assert all(p.grad is not None for n, p in model.backbone.blocks.named_parameters())
