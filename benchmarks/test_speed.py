"""The paths of nbs/experiments/speed.ipynb for pytest-benchmark: `pytest benchmarks`, after `pip install -e ".[bench]"`.
No test of `make test`: times are compared with saved ones (--benchmark-autosave, --benchmark-compare), never with a limit."""
import pytest, timm, torch
from fastai.torch_core import set_seed
from timm.utils import ModelEmaV3

from mlds.all import *
from mlds.annotations import Mask, weaken
from mlds.classsets import compact, from_labels, pyramid
from mlds.supervision import MixedLoss, mlds_loss

pytest.importorskip('pytest_benchmark')
torch.set_num_threads(1)
TASK, STRIDES = Task(('background', 'IRF', 'SRF', 'PED')), (16, 8, 4, 2, 1)


def heads_of(b, c, h, w): return [torch.randn(b, c, h//s, w//s, requires_grad=True) for s in STRIDES]

@pytest.mark.parametrize('shape', [(8, 4, 512, 512), (4, 14, 256, 256)])
def test_multi_label_loss(benchmark, shape):
    b, c, h, w = shape
    heads, sets = heads_of(*shape), from_labels(torch.randint(0, c, (b, h, w)), c)
    def loss():
        levels = pyramid(compact(sets, c), [z.shape[-2:] for z in heads], c)
        return torch.autograd.grad(sum(mlds_loss(z, level).sum() for z, level in zip(heads, levels)), heads)
    benchmark(loss)

@pytest.mark.parametrize('kind', ['mask', 'boxes', 'tight boxes', 'image labels'])
@pytest.mark.parametrize('side', [64, 256])
def test_mixed_loss(benchmark, kind, side):
    masks = [Mask(m) for m in oct_phantoms(4, 2, side, seed=0)['mask']]
    sets = torch.stack([weaken(m, kind if i % 2 else 'mask', 4).class_sets((side, side), 4) for i, m in enumerate(masks)])
    heads, loss = heads_of(len(masks), 4, side, side), MixedLoss(TASK)
    full = torch.randn(len(masks), 4, side, side, requires_grad=True)
    benchmark(lambda: torch.autograd.grad(loss((full, heads), sets), [full, *heads]))


@pytest.fixture
def catalogue(tmp_path):
    cat = split_groups(read_folder(save_phantoms(tmp_path/'oct', 12, 3, (64, 64), 0)), .2, .2, 0)
    return simulate_budget(cat, 6, 'boxes', seed=0)

def learner(cat, n):
    set_seed(0)
    dls = make_dataloaders(cat, quota=dict(boxes=4, mask=4), iterations=n, seed=0)
    model = make_network(cat.task, width=8, head_width=16, negative_slope=.1)
    return make_learner(dls, model, teaching=dict(start=0., ramp=0.))

def test_training_of_twenty_steps(benchmark, catalogue):
    learn = learner(catalogue, 20)
    def train():
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
    benchmark.pedantic(train, rounds=5, warmup_rounds=1)

def test_loading_twenty_batches(benchmark, catalogue):
    loader = learner(catalogue, 20).dls.train
    benchmark(lambda: [batch for batch in loader])


@pytest.mark.parametrize('average', ['ours', 'timm'])
def test_teacher_update(benchmark, average):
    from mlds.teacher import _Average
    model = make_network(TASK, width=64)
    ema = (_Average if average == 'ours' else ModelEmaV3)(model, decay=.99)
    if average == 'ours': ema.pair(model)
    benchmark(ema.update, model, 1000)

@pytest.mark.parametrize('name', ['resnet18', 'vit_tiny_patch16_224'])
def test_integrated_gradients(benchmark, name):
    model = timm.create_model(name, num_classes=2, in_chans=1).eval()
    x, targets = torch.rand(1, 1, 224, 224), torch.ones(1, 2, dtype=torch.bool)
    benchmark.pedantic(integrated_gradients, (model, x, targets), dict(steps=2, chunk=2), rounds=5, warmup_rounds=1)

def test_prediction_of_a_folder(benchmark, tmp_path, catalogue):
    model, files, rounds = make_network(TASK, width=8, head_width=16).eval(), list(catalogue.image)[:16], iter(range(1000))
    benchmark(lambda: predict_folder(model, files, tmp_path/f'predicted-{next(rounds)}', bar=False))
