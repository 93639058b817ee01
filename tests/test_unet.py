"Properties of `mlds.unet`: sizes, the cell contract, forms of the output, encoders."
import pickle

import pytest
import timm
import torch
from fastai.torch_core import TensorImage, apply, to_concat, to_detach, to_float
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

from mlds.transfer import trained_groups
from mlds.unet import (EncoderDecoder, PlainEncoder, Prediction, TimmEncoder, TimmUNet, UNet, _crop_cells, _norm_layer,
                       _pad_to_multiple, level_table)

check = lambda *strategies: lambda f: settings(max_examples=25, deadline=None)(given(*strategies)(f))
torch.set_num_threads(1)
side = st.integers(1, 40)
tiny = lambda **kwargs: UNet(1, 3, **{**dict(width=2, depth=2, head_width=4), **kwargs})
cells = lambda size, s: tuple(-(-n//s) for n in size)


@check(side, side, st.integers(0, 3), st.sampled_from(['batch', 'group']), st.sampled_from(['transpose', 'bilinear']))
def test_sizes_of_logits_and_heads(h, w, depth, norm, upsample):
    model = tiny(depth=depth, norm=norm, upsample=upsample).eval()
    pred = model(torch.randn(2, 1, h, w))
    assert type(pred) is Prediction and model.strides == [2**i for i in reversed(range(depth+1))]
    assert pred.logits.shape == (2, 3, h, w)
    assert [tuple(z.shape) for z in pred.aux_logits] == [(2, 3, *cells((h, w), s)) for s in model.strides]
    table = level_table(model, (h, w))[['rows', 'columns']]
    assert table.values.tolist() == [list(z.shape[2:]) for z in pred.aux_logits]


@check(side, side, st.sampled_from([1, 2, 4, 8, 16]))
def test_padding_and_cropping_are_inverse(h, w, multiple):
    x = torch.randn(1, 2, h, w)
    padded = _pad_to_multiple(x, multiple)
    assert padded.shape[-2] % multiple == padded.shape[-1] % multiple == 0
    assert torch.equal(_crop_cells(padded, (h, w), 1), x)
    assert (padded[..., h-1:, :w] == x[..., -1:, :]).all() and (padded[..., :h, w-1:] == x[..., -1:]).all()


@check(st.integers(1, 20), st.integers(1, 20), st.data())
def test_a_cell_sees_its_own_pixels_when_kernels_have_only_a_centre(h, w, data):
    torch.manual_seed(0)
    model = tiny(width=4).double().eval()
    for m in model.encoder.modules():
        if isinstance(m, torch.nn.Conv2d): m.weight.data *= torch.eye(3).flip(0)[1].outer(torch.tensor([0, 1, 0]))
    i, j = (data.draw(st.integers(0, -(-n//4)-1)) for n in (h, w))
    x = torch.randn(4, 1, h, w, dtype=torch.double, requires_grad=True)
    rows, columns = torch.autograd.grad(model(x).aux_logits[0][..., i, j].sum(), x)[0].sum((0, 1)).nonzero().T
    assert (rows // 4 == i).all() and (columns // 4 == j).all()


def test_train_and_eval_return_the_same_form():
    x = torch.randn(2, 1, 16, 16)
    model = tiny()
    shapes = [[z.shape for z in (p.logits, *p.aux_logits)] for p in (model.train()(x), model.eval()(x))]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize('change', [
    to_detach, to_float, lambda p: apply(torch.clone, p), lambda p: to_concat([p]),
    lambda p: pickle.loads(pickle.dumps(p)), lambda p: Prediction(list(p)), lambda p: Prediction(z for z in p)])
def test_predictions_survive(change):
    pred = Prediction(torch.randn(2, 3, 4, 4), [torch.randn(2, 3, 1, 1), torch.randn(2, 3, 2, 2)])
    same = change(pred)
    assert type(same) is Prediction and len(same.aux_logits) == 2
    assert all(torch.equal(a, b) for a, b in zip((pred.logits, *pred.aux_logits), (same.logits, *same.aux_logits)))


def test_images_of_fastai_give_plain_tensors():
    pred = tiny()(TensorImage(torch.randn(2, 1, 16, 16)))
    assert {type(z) for z in (pred.logits, *pred.aux_logits)} == {torch.Tensor}


@pytest.mark.parametrize('shape', [(1, 3, 8, 8), (1, 8, 8), (1, 1, 1, 8, 8)])
def test_wrong_shapes_name_the_culprit(shape):
    with pytest.raises(ValueError, match=r'shape \(batch, 1, H, W\) expected'): tiny()(torch.randn(shape))


@pytest.mark.parametrize('kwargs', [dict(norm='layer'), dict(upsample='nearest')])
def test_unknown_options(kwargs):
    with pytest.raises(ValueError, match='is unknown: choose'): tiny(**kwargs)


@check(st.integers(1, 300))
def test_group_norm_fits_any_width(n):
    layer = _norm_layer('group', n)
    assert n % layer.num_groups == 0 and layer.num_groups <= 32 and (n < 8 or n // layer.num_groups >= 8)


def test_sizes_of_the_papers_network():
    with torch.device('meta'): model = UNet(1, 4)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(model.encoder) + count(model.decoder) == 31_036_416
    assert model.encoder.channels == [64, 128, 256, 512, 1024] and model.channels == [1024, 512, 256, 128, 64]
    assert len(model.aux_heads) == 5 and [h[0][0].out_channels for h in model.aux_heads] == [64]*5


def test_group_norm_ignores_the_rest_of_the_batch():
    model, x = tiny(norm='group').train(), torch.randn(3, 1, 16, 16)
    torch.testing.assert_close(model(x).logits[:1], model(x[:1]).logits)


def test_splitter_has_every_parameter_once():
    model = tiny()
    trunk, heads = trained_groups(model)
    assert sorted(map(id, [*trunk, *heads])) == sorted(map(id, model.parameters()))
    assert set(map(id, heads)) == {id(p) for m in (model.aux_heads, model.mask_head) for p in m.parameters()}


@pytest.mark.parametrize('name,first', [
    ('test_resnet', 2), ('test_efficientnet', 2), ('test_convnext', 4), ('vgg11', 1)])
def test_timm_encoders(name, first):
    model = TimmUNet(2, 3, name, width=2, head_width=4).eval()
    assert model.encoder.strides[0] == first
    pred = model(torch.randn(1, 2, 45, 70))
    assert pred.logits.shape == (1, 3, 45, 70)
    assert [tuple(z.shape[2:]) for z in pred.aux_logits] == [cells((45, 70), s) for s in (32, 16, 8, 4, 2, 1)]


@pytest.mark.parametrize('trained,wanted', [(1, 1), (3, 1), (1, 3), (3, 3)])
def test_own_weights_with_any_number_of_channels(tmp_path, trained, wanted):
    source = timm.create_model('test_resnet', num_classes=5, in_chans=trained)
    save_file(source.state_dict(), tmp_path/'w.safetensors')
    state = TimmEncoder('test_resnet', wanted, tmp_path/'w.safetensors').state_dict()
    assert torch.equal(state['body.layer3.0.conv1.weight'], source.layer3[0].conv1.weight)
    # the response to an image of equal channels stays the same
    torch.testing.assert_close(state['body.conv1.0.weight'].sum(1), source.conv1[0].weight.sum(1), atol=1e-5, rtol=1e-4)


def test_weights_of_another_network_are_refused(tmp_path):
    save_file(timm.create_model('test_efficientnet', num_classes=5).state_dict(), tmp_path/'w.safetensors')
    with pytest.raises(ValueError, match='lacks .* weights of test_resnet'):
        TimmEncoder('test_resnet', 3, tmp_path/'w.safetensors')


def test_any_encoder_with_strides_and_channels_will_do():
    model = EncoderDecoder(PlainEncoder(1, width=3, depth=1), 1, 2, width=5, head_width=4)
    assert model(torch.randn(2, 1, 9, 9)).logits.shape == (2, 2, 9, 9)
