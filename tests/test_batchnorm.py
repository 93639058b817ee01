"Two forward passes with statistics of their own: what decided images learn does not depend on the others."
from copy import deepcopy

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from hypothesis import given, settings, strategies as st

from mlds.annotations import Boxes, ImageLabels, Mask, PartialMask, Points, Unlabelled
from mlds.batchnorm import SeparateStatistics
from mlds.catalogue import Catalogue, simulate_budget, split_groups
from mlds.checkpoints import Checkpoint
from mlds.classsets import ClassSets
from mlds.dataloaders import make_dataloaders
from mlds.learner import fit, make_learner, mixed_precision
from mlds.phantoms.oct import OCT_CLASSES, oct_phantoms
from mlds.supervision import MixedLoss
from mlds.task import Task
from mlds.unet import TimmUNet, UNet

torch.set_num_threads(1)
OCT, CHEST = Task(tuple(OCT_CLASSES)), Task(('background', 'lungs', 'heart', 'effusion'), overlapping=True)


class Keep(Callback):
    "What a batch did: gradients, predictions and running statistics."
    run_valid = False
    def after_pred(self): self.pred = self.learn.pred[0].detach().clone()
    def after_backward(self): self.grads = torch.cat([p.grad.flatten() for p in self.model.parameters()])
    order = 30


def batch(annotations, task=OCT, size=32, seed=0):
    torch.manual_seed(seed)
    sets = torch.stack([a.class_sets((size, size), task.n_classes) for a in annotations])
    return torch.randn(len(annotations), 1, size, size), ClassSets(sets)

def mask(seed=0, size=32, bits=False):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 4, (size//4, size//4), generator=g).repeat_interleave(4, 0).repeat_interleave(4, 1)
    return Mask((torch.maximum(torch.tensor(1), 2*ids) if bits else ids).numpy(), bits=bits)

def step(net, x, sets, task=OCT, cbs=(), two=True):
    "One batch, nothing learnt from it."
    dls = DataLoaders([(x, sets)], [(x, sets)])
    dls.task = task
    learn = Learner(dls, deepcopy(net), loss_func=MixedLoss(task), cbs=[Keep(), *cbs, *[SeparateStatistics()]*two])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    return learn

def statistics(learn): return {k: v for k, v in learn.model.named_buffers()}

def check_same(a, b, tol=1e-4):
    torch.testing.assert_close(a.keep.grads, b.keep.grads, rtol=tol, atol=tol)
    for k, v in statistics(a).items(): torch.testing.assert_close(v, statistics(b)[k], rtol=tol, atol=tol)


SILENT = {'nothing': Unlabelled(), 'partial mask of nothing': PartialMask(mask().labels*0, looked_for=[])}

@pytest.mark.parametrize('silent', SILENT.values(), ids=SILENT)
@pytest.mark.parametrize('net', [UNet(1, 4, width=4, depth=3), TimmUNet(1, 4, 'test_resnet', width=4)], ids=['plain', 'timm'])
def test_silent_images_change_nothing_for_the_others(net, silent):
    x, sets = batch([mask(1), silent, mask(2), silent])
    some = torch.tensor([0, 2])
    alone = step(net, x[some], sets[some])
    check_same(alone, step(net, x, sets))
    with pytest.raises(AssertionError): check_same(alone, step(net, x, sets, two=False))


@pytest.mark.parametrize('weak', [ImageLabels([1]), Points([(1, 3, 3), (0, 9, 9)])], ids=['labels', 'points'])
def test_weak_images_leave_the_running_statistics_alone_and_have_a_gradient(weak):
    net = UNet(1, 4, width=4, depth=2)
    x, sets = batch([mask(1), mask(2), weak, weak])
    alone, both = step(net, x[:2], sets[:2]), step(net, x, sets)
    for k, v in statistics(alone).items(): torch.testing.assert_close(v, statistics(both)[k])
    assert not torch.allclose(alone.keep.grads, both.keep.grads, atol=1e-4)


def test_overlapping_classes():
    net = UNet(1, 4, width=4, depth=2)
    x, sets = batch([mask(1, bits=True), mask(2, bits=True), Unlabelled(), Unlabelled()], CHEST)
    check_same(step(net, x[:2], sets[:2], CHEST), step(net, x, sets, CHEST))


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(5)))
def test_predictions_keep_the_order_of_the_batch(order):
    net = UNet(1, 4, width=4, depth=2)
    x, sets = batch([mask(1), mask(2), Unlabelled(), Unlabelled(), ImageLabels([2])])
    order = torch.tensor(order)
    pred = step(net, x, sets).keep.pred
    torch.testing.assert_close(step(net, x[order], sets[order]).keep.pred, pred[order], rtol=1e-4, atol=1e-4)


def test_boxes_are_decided_images():
    "Boxes leave little open: such a batch passes once."
    x, sets = batch([mask(1), Boxes([(1, 3, 3, 9, 9)])])
    assert step(UNet(1, 4, width=4, depth=2), x, sets).separate_statistics.is_first is None


@pytest.mark.parametrize('cbs', [mixed_precision('bf16')], ids=['bf16'])
def test_other_arithmetic(cbs):
    x, sets = batch([mask(1), mask(2), Unlabelled(), Unlabelled()])
    learn = step(UNet(1, 4, width=4, depth=2), x, sets, cbs=cbs)
    assert learn.keep.grads.isfinite().all()


def test_a_compiled_network():
    net = UNet(1, 4, width=4, depth=2)
    x, sets = batch([mask(1), mask(2), Unlabelled(), Unlabelled()])
    plain, compiled = step(net, x, sets), deepcopy(net)
    compiled.compile(backend='aot_eager')
    check_same(plain, step(compiled, x, sets), 1e-3)


def few():
    rows = oct_phantoms(volumes=6, scans=3, size=32, seed=0)
    full = split_groups(Catalogue(rows.assign(annotation=[Mask(m) for m in rows['mask']]), OCT))
    return simulate_budget(full, 3, 'unlabelled', seed=0)

def learner(teaching=None):
    torch.manual_seed(0)
    dls = make_dataloaders(few(), bs=4, iterations=6, seed=0)
    return make_learner(dls, network=dict(width=4, depth=2, head_width=8), teaching=dict(start=.2, ramp=.2) | (teaching or {}))


@pytest.mark.parametrize('confidence', ['fixed', 'calibrated', 'flexmatch', 'freematch'])
def test_a_training_resumes_to_the_same_weights(tmp_path, confidence):
    class Stop(Exception): pass
    class Hang(Callback):
        order = -2000
        def before_epoch(self):
            if self.epoch == 2: raise Stop('killed')
    fit(whole := learner(dict(confidence=confidence)), epochs=4, bar=False)
    cut = learner(dict(confidence=confidence))
    cut.add_cb(Hang())
    with pytest.raises(Stop): fit(cut, epochs=4, checkpoint=tmp_path/'c.pt', bar=False)
    fit(on := learner(dict(confidence=confidence)), epochs=4, checkpoint=tmp_path/'c.pt', bar=False)
    for k, v in whole.teacher.state_dict().items(): assert torch.equal(v, on.teacher.state_dict()[k]), k


def test_a_checkpoint_from_one_pass_is_refused(tmp_path):
    fit(learner(dict(batch_statistics='together')), epochs=1, checkpoint=tmp_path/'c.pt', bar=False)
    with pytest.raises(ValueError, match='separate_statistics'):
        fit(learner(), epochs=1, checkpoint=tmp_path/'c.pt', bar=False)


def test_unknown_choice():
    with pytest.raises(ValueError, match='separate, together'): learner(dict(batch_statistics='apart'))
