"Two processes that share a batch learn what one learns from the whole batch."
import os, subprocess, sys

import pytest, torch

from conftest import ROOT

TRAINING = '''
import sys, torch
from functools import partial
from fastai.callback.core import Callback
from fastai.optimizer import SGD
from torch import distributed
from mlds.all import *
from mlds.learner import join_processes
from mlds.phantoms.oct import OCT_CLASSES

rank = join_processes()
rows = oct_phantoms(volumes=6, scans=4, size=32, seed=0)
full = split_groups(Catalogue(rows.assign(annotation=[Mask(m) for m in rows['mask']]), Task(OCT_CLASSES)))
few = simulate_budget(full, 4, 'tight boxes', seed=0)
kinds = [Unlabelled() if s == 'train' and a.kind != 'mask' and k % 2 else a
         for k, (a, s) in enumerate(zip(few.annotation, few.split))]
few = few.assign(annotation=kinds)
quota = {'mask': 4, 'tight boxes': 2, 'unlabelled': 2}
dls = make_dataloaders(few, quota=quota, iterations=3, tfms=[], seed=0)
torch.manual_seed(rank) # the first process has the last word on the weights
network = make_network(dls.task, width=4, depth=3, head_width=8)

class Double(Callback):
    "In single precision a rounding error decides now and then on which side of its kink a ReLU is."
    order = 5
    def before_batch(self): self.learn.xb = self.x.double(),

class Seen(Callback):
    order, run_valid = 95, False
    def before_fit(self): self.losses, self.grads, self.sizes, self.passes = [], [], [], []
    def after_pred(self):
        self.sizes.append(len(self.x))
        self.passes.append(self.separate_statistics.is_first is not None)
    def after_backward(self):
        self.losses.append(self.loss_grad.item())
        self.grads.append(torch.cat([p.grad.flatten().clone() for p in self.model.parameters()]))

seen = Seen()
learn = make_learner(dls, network, opt_func=partial(SGD, mom=.9), cbs=[Double(), seen],
                     teaching=dict(augment=False, start=.5, ramp=0., threshold=.3))
learn.model.double()
learn.mean_teacher._begin()
learn.mean_teacher.ema.module.double()
history = fit(learn, lr=.01, epochs=2, checkpoint=sys.argv[2])
torch.save(dict(losses=seen.losses, grads=seen.grads, sizes=seen.sizes, passes=seen.passes,
                student=learn.model.state_dict(), teacher=learn.mean_teacher.ema.module.state_dict(),
                scores=history.to_dict('list'), drawn=dict(dls.train.drawn)), f'{sys.argv[1]}.{rank}')
'''

def training(folder, name, *launcher):
    "What each process of a training saw and learnt."
    (folder/'training.py').write_text(TRAINING)
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    done = subprocess.run([sys.executable, *launcher, 'training.py', name, f'{name}.pt'], cwd=folder, env=env,
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f) for f in sorted(folder.glob(f'{name}.[0-9]'))], done.stdout

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('processes')
    (one,), _ = training(folder, 'one')
    two, said = training(folder, 'two', '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2')
    return one, two, said

def close(a, b, tolerance=1e-6):
    return torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=tolerance, atol=tolerance)

def test_loss_gradient_and_weights_are_those_of_one_process(trained):
    one, two, _ = trained
    assert len(two) == 2 and one['sizes'] == [8]*6 and [t['sizes'] for t in two] == [[4]*6]*2
    assert any(one['passes']), 'some batch has to be divided into decided and undecided images'
    for t in two:
        assert t['passes'] == one['passes']
        assert close(t['losses'], one['losses'])
        for a, b in zip(t['grads'], one['grads']): assert (a - b).norm() < 1e-6*b.norm()
        for part in ('student', 'teacher'):
            for name, value in one[part].items(): assert close(t[part][name], value), name

def test_processes_agree_to_the_bit(trained):
    _, (first, second), _ = trained
    assert first['losses'] == second['losses'] and first['drawn'] == second['drawn']
    for part in ('student', 'teacher'):
        for name, value in first[part].items(): assert torch.equal(second[part][name], value), name

def test_quotas_and_scores_are_those_of_one_process_and_one_speaks(trained):
    one, two, said = trained
    assert one['drawn'] == {'mask': 24, 'tight boxes': 12, 'unlabelled': 12}
    for t in two:
        assert t['drawn'] == one['drawn']
        for name, values in one['scores'].items(): assert close(t['scores'][name], values), name
    assert said.count('epoch 1/2') == 1
