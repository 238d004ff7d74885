"""The reference model against the paper's tables, and weights that do not fit."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dualtoken_deploy import create_model
from dualtoken_deploy.errors import Note, UsageError, WeightsError
from dualtoken_deploy.models.ablations import describe_ablations
from dualtoken_deploy.models.count import count_macs, count_params, count_products
from dualtoken_deploy.models.dualtoken_vit import TokenResize, WindowAttention
from dualtoken_deploy.models.listing import shipped
from dualtoken_deploy.models.registry import build, make_config, parse_image_size, random_model
from dualtoken_deploy.models.weights import BUILT_IN_WEIGHTS, read_tensors
from tests.numerics import assert_close

# Tables 2, 7, 8 and 9 of the paper: parameters in millions and FLOPs (there: multiply-accumulates) in billions.
PAPER = [
    ("s", {}, 11.9, 1.05),
    ("s-mix", {}, 11.4, 1.04),
    ("t-mix", {}, 5.8, 0.5),
    ("s", {"global_tokens": 0}, 10.8, 0.99),
    ("s", {"global_tokens": 3}, 11.9, 0.93),
    ("s", {"global_tokens": 4}, 11.9, 0.95),
    ("s", {"global_tokens": 5}, 11.9, 0.98),
    ("s", {"global_tokens": 6}, 11.9, 1.01),
    ("s", {"global_tokens": 8}, 11.9, 1.10),
    ("s-mix", {"downsampling": "onestep"}, 11.3, 1.01),
    ("s-mix", {"local_attention": "window"}, 10.8, 0.92),
]
SMALL: dict[str, Any] = {"num_classes": 10, "image_size": 64}


@pytest.mark.parametrize(("variant", "options", "params_m", "macs_g"), PAPER)
def test_counts_are_the_papers(variant: str, options: dict[str, Any], params_m: float, macs_g: float) -> None:
    with torch.device("meta"):
        model = build(make_config(variant, **options)).eval()
    assert round(count_params(model) / 1e6, 1) == params_m
    tolerance = 0.05 if macs_g == 0.5 else 0.03 * macs_g  # T's 0.5 is printed with one digit
    assert count_macs(model, (224, 224)) / 1e9 == pytest.approx(macs_g, abs=tolerance)


@pytest.mark.parametrize("variant", ["t", "s-mix"])
def test_products_and_the_rest_make_up_the_macs(variant: str) -> None:
    """MACs less the matrix products are the depth-wise convolutions and the normalisations, counted here by hand."""
    model = create_model(variant)
    products = sum(b * m * k * n * count for b, m, k, n, count in count_products(model, (224, 224))[1])
    rest = 0

    def add(module: torch.nn.Module, _: Any, out: torch.Tensor) -> None:
        nonlocal rest
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            rest += out.numel() * module.kernel_size[0] * module.kernel_size[1]
        elif isinstance(module, torch.nn.LayerNorm):
            rest += 5 * out.numel()
        elif isinstance(module, torch.nn.BatchNorm2d):
            rest += 2 * out.numel()

    for module in model.modules():
        module.register_forward_hook(add)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    # Global tokens pass through two LayerNorms and their MLPs once a batch; nothing else is left over.
    assert products + rest == count_macs(model, (224, 224))


def test_window_attention_equals_a_loop_over_windows_and_pairs() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(8, heads=2, window=7, drop_path=0.0).double()
    torch.nn.init.normal_(attention.position_bias)
    grid = (9, 15)
    x = torch.randn(1, grid[0] * grid[1], 8, dtype=torch.float64)
    with torch.no_grad():
        actual = attention(x, grid)
        z = F.pad(attention.norm(x).reshape(1, *grid, 8), (0, 0, 0, 6, 0, 5))[0]  # 14 x 21
        expected = torch.zeros(14, 21, 8, dtype=torch.float64)
        for top in range(0, 14, 7):
            for left in range(0, 21, 7):
                places = [(top + i, left + j) for i in range(7) for j in range(7)]
                q, k, v = attention.qkv(torch.stack([z[p] for p in places])).split(8, dim=-1)
                for head in range(2):
                    part = slice(4 * head, 4 * head + 4)
                    scores = q[:, part] @ k[:, part].T / 2.0  # 1 / sqrt(4)
                    for a, (ya, xa) in enumerate(places):
                        for b, (yb, xb) in enumerate(places):
                            row = (ya - yb + 6) * 13 + (xa - xb + 6)
                            scores[a, b] += attention.position_bias[row, head]
                    out = scores.softmax(-1) @ v[:, part]
                    for a, place in enumerate(places):
                        expected[place][part] = out[a]
        expected = x + expected[:9, :15].reshape(1, -1, 8)
    assert_close(actual, expected, relative=1e-12)


@pytest.mark.parametrize("method", ["normal", "normal-star"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_normal_global_tokens_read_x_and_are_read(method: str, stage: int) -> None:
    """Figure 3 (c), (d) written out with torch's own multi-head attention: G reads X or X_ga, then X reads G_new."""
    model = random_model("t", token_method=method, global_tokens=8, **SMALL).double()
    block = model.get_submodule(f"stage{stage}.block1")
    token, grid = block.get_submodule("token"), (8 >> stage - 1, 8 >> stage - 1)
    channels = (48, 96, 192)[stage - 1]
    x = torch.randn(2, grid[0] * grid[1], channels, dtype=torch.float64)
    g = torch.randn(2, 8, channels, dtype=torch.float64)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        attention = torch.nn.MultiheadAttention(channels, (2, 4, 8)[stage - 1], batch_first=True).double()
        attention.in_proj_weight.copy_(torch.eye(channels).repeat(3, 1))
        attention.in_proj_bias.zero_()
        attention.out_proj.weight.copy_(torch.eye(channels))
        attention.out_proj.bias.zero_()
        out: torch.Tensor = attention(q, k, v, need_weights=False)[0]
        return out

    with torch.no_grad():
        z = token.get_submodule("norm")(x)
        source = token.get_submodule("norm_g")(x)
        if method == "normal-star" or stage == 3:
            pooled = token.get_submodule("downsample")(source, grid)
            source = attend(*token.get_submodule("aggregate.qkv")(pooled).chunk(3, dim=-1))
        query = token.get_submodule("fuse.q")(token.get_submodule("fuse.mlp")(g))
        g_new = attend(query, *token.get_submodule("fuse.kv")(source).chunk(2, dim=-1))
        q = token.get_submodule("broadcast.q")(z)
        read = attend(q, *token.get_submodule("broadcast.kv")(g_new).chunk(2, dim=-1))
        x_global, actual = token(x, g, grid)
    assert_close(actual, g_new, relative=1e-12)
    assert_close(x_global, token.get_submodule("broadcast.proj")(read).detach(), relative=1e-12)


def test_ablations_are_the_papers_tables() -> None:
    rows = {(r["table"], r["row"]): r for r in describe_ablations()}
    assert shipped("ablations") == list(rows.values()), "python -m dualtoken_deploy.models.listing"
    assert {table for table, _ in rows} == {6, 7, 8, 9}
    assert len(rows) == 3 + 7 + 2 + 2
    for row in rows.values():
        assert round(row["params"] / 1e6, 1) == row["paper_params_m"]
        assert row["macs"] / 1e9 == pytest.approx(row["paper_macs_g"], rel=0.03)


@pytest.mark.parametrize("side", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("grid", [(7, 7), (2, 2), (8, 10)])
def test_token_resize_is_interpolate(side: int, grid: tuple[int, int]) -> None:
    x = torch.randn(2, grid[0] * grid[1], 5, dtype=torch.float64)
    as_map = x.reshape(2, *grid, 5).permute(0, 3, 1, 2)
    wanted = F.interpolate(as_map, (side, side), mode="bilinear", align_corners=False)
    actual = TokenResize(side)(x, grid)
    torch.testing.assert_close(actual, wanted.flatten(2).transpose(1, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (224, 224), (256, 320), (223, 301)])
def test_features_have_strides_8_16_32_of_the_padded_image(height: int, width: int) -> None:
    model = create_model("t", **SMALL)
    rows, columns = -(-height // 32), -(-width // 32)
    with torch.no_grad():
        maps = model.features(torch.randn(2, 3, height, width))
    assert [tuple(m.shape) for m in maps] == [
        (2, 48, 4 * rows, 4 * columns), (2, 96, 2 * rows, 2 * columns), (2, 192, rows, columns)
    ]  # fmt: skip


def test_padding_is_zeros_at_the_right_and_the_bottom() -> None:
    model = random_model("t", **SMALL)
    image = torch.randn(1, 3, 70, 90)
    padded = F.pad(image, (0, 6, 0, 26))
    with torch.no_grad():
        torch.testing.assert_close(model(image), model(padded), rtol=0, atol=0)


def test_an_image_does_not_depend_on_its_batch() -> None:
    model = random_model("t-mix", **SMALL).double()
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        alone = torch.cat([model(i[None]) for i in images])
        assert_close(model(images), alone, relative=1e-12)


def test_drop_path_acts_in_training_alone() -> None:
    model = random_model("t", drop_path=0.5, **SMALL)
    image = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(image), model(image))
        model.train()
        assert not torch.equal(model(image), model(image))


def test_random_models_hide_nothing() -> None:
    for name, tensor in random_model("t", **SMALL).state_dict().items():
        if tensor.is_floating_point():
            assert (tensor != 0).all(), name
            assert (tensor != 1).all(), name


def test_one_seed_gives_one_model_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b, c = (random_model("t", seed=s, **SMALL).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["head.fc.weight"], c["head.fc.weight"])


# --- weights and options ---


def as_before(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a model whose token modules have one LayerNorm: norm_g is what norm is, and left out."""
    return {k: t for k, t in state.items() if ".token.norm_g." not in k}


@pytest.mark.parametrize(
    "options", [{}, {"token_method": "normal", "global_tokens": 8}, {"downsampling": "onestep"}], ids=str
)
def test_files_with_one_token_norm_load_as_what_they_were_and_say_so(options: dict[str, Any], tmp_path: Path) -> None:
    """Both norms begin as the one: in every place the model of before read its one norm's output."""
    model = random_model("t-mix", **options, **SMALL).double()
    old = {k: t.float() for k, t in as_before(model.state_dict()).items()}
    save_file(old, tmp_path / "old.safetensors")
    with pytest.warns(Note, match="one LayerNorm in each token module"):
        loaded = create_model("t-mix", weights=tmp_path / "old.safetensors", **options, **SMALL).double()
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for module in model.modules():  # the model of before: one norm, read twice
        if hasattr(module, "norm_g"):
            setattr(module, "norm_g", None)  # noqa: B010 (any module's attribute, to the type checker)
    model.load_state_dict({k: t.double() for k, t in old.items()})
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))


def test_the_two_token_norms_are_read_where_they_should_be() -> None:
    """norm_g alone moves what becomes global tokens; norm alone moves who reads them."""
    block: Any = random_model("t-mix", **SMALL).get_submodule("stage2.block1.token")
    x, g = torch.randn(1, 16, 96), torch.randn(1, 49, 96)
    with torch.no_grad():
        read, g_new = block(x, g, (4, 4))
        block.norm.bias.add_(1.0)
        other_read, other_g = block(x, g, (4, 4))
        assert torch.equal(other_g, g_new)
        assert not torch.equal(other_read, read)
        block.norm_g.bias.add_(1.0)
        assert not torch.equal(block(x, g, (4, 4))[1], g_new)


def test_without_global_tokens_there_is_one_norm(tmp_path: Path) -> None:
    model = random_model("t", global_tokens=0, **SMALL)
    assert not any("norm_g" in k for k in model.state_dict())
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_model("t", global_tokens=0, weights=tmp_path / "w.safetensors", **SMALL)


@pytest.mark.parametrize(
    "word", sorted(set(BUILT_IN_WEIGHTS) - {"lorenz", "shapes-tokens"})
)  # of before there were two
def test_weights_that_ship_have_both_norms_equal(word: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = read_tensors(BUILT_IN_WEIGHTS[word])
    twins = [k for k in state if ".token.norm_g." in k]
    assert len(twins) == 2 * 12
    assert all(torch.equal(state[k], state[k.replace("norm_g", "norm")]) for k in twins)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_come_back_as_they_were_saved(tmp_path: Path, suffix: str) -> None:
    model = random_model("t", **SMALL)
    path = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save({"model": model.state_dict(), "epoch": 3}, path)
    else:
        save_file(model.state_dict(), path)
    loaded = create_model("t", weights=path, **SMALL).state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in model.state_dict().items())


def test_every_key_that_does_not_fit_is_named(tmp_path: Path) -> None:
    state = dict(random_model("t", **SMALL).state_dict())
    del state["stem.norm.bias"], state["stage3.block2.ffn.fc1.weight"]
    state |= {"surplus.weight": torch.ones(1), "stage1.block1.token.broadcast.q.bias": torch.ones(5)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as caught:
        create_model("t", weights=tmp_path / "w.safetensors", **SMALL)
    for part in (
        *("stem.norm.bias", "stage3.block2.ffn.fc1.weight", "surplus.weight"),
        *("broadcast.q.bias (5,) instead of (48,)", "2 missing", "1 unexpected", "1 mis-shaped"),
    ):
        assert part in str(caught.value)


def test_a_head_of_another_class_count_is_replaced_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(random_model("t", **SMALL).state_dict(), path)
    other = SMALL | {"num_classes": 7}
    with pytest.raises(WeightsError, match="replace_head=True"):
        create_model("t", weights=path, **other)
    model = create_model("t", weights=path, replace_head=True, **other)
    assert model.head.fc.weight.shape == (7, 1280)


class _Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/dualtoken-attack"),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    mark = Path("/tmp/dualtoken-attack")
    mark.unlink(missing_ok=True)
    torch.save({"model": _Attack()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(_Attack()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(WeightsError, match=r"could run code|not a whole"):
            create_model("t", weights=tmp_path / name, **SMALL)
    assert not mark.exists()


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    state = dict(random_model("t", **SMALL).state_dict())
    state["head.fc.bias"][3] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"NaN or infinity in head\.fc\.bias"):
        create_model("t", weights=tmp_path / "w.safetensors", **SMALL)


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_truncated_safetensors_are_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "w.safetensors"
    save_file(random_model("t", **SMALL).state_dict(), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(WeightsError, match="not a whole safetensors"):
        create_model("t", weights=path, **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_tokens": 2}, "0, 3, 4, 5, 6, 7, 8"),
        ({"token_method": "special"}, "position-aware, normal, normal-star"),
        ({"token_method": "normal", "global_tokens": 0}, "need global_tokens"),
        ({"downsampling": "twostep"}, "stepwise, onestep"),
        ({"local_attention": "none"}, "conv, window"),
        ({"token_mlp": "mixer"}, "mlp, mix"),
        ({"alpha": 1.5}, r"\[0, 1\]"),
        ({"drop_path": 1.0}, r"\[0, 1\)"),
        ({"num_classes": 0}, "at least 1"),
        ({"depth": 3}, "valid options"),
        ({"image_size": 63}, "at least 64"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_config("s", **options)


def test_an_unknown_variant_lists_the_valid_ones() -> None:
    with pytest.raises(UsageError, match=r"valid variants: t, t-mix, s, s-mix"):
        create_model("xl")


@pytest.mark.parametrize(
    ("given", "wanted"), [(224, (224, 224)), ("224", (224, 224)), ("256x320", (256, 320)), ((65, 100), (65, 100))]
)
def test_image_sizes(given: Any, wanted: tuple[int, int]) -> None:
    assert parse_image_size(given) == wanted


@pytest.mark.parametrize("given", ["", "x", "224x", "1x2x3", "a", "-224", "224.5", (1, 2, 3)])
def test_bad_image_sizes(given: Any) -> None:
    with pytest.raises(UsageError):
        parse_image_size(given)
