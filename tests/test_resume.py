"A training killed without warning, with all its workers, ends with the numbers of one that was left in peace."
import hashlib, multiprocessing, os, random, signal, time

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import Learner
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastcore.basics import noop
from torch import nn

from mlds.annotations import Mask
from mlds.catalogue import Catalogue, simulate_budget, split_groups
from mlds.checkpoints import Checkpoint
from mlds.dataloaders import make_dataloaders
from mlds.learner import ScoreCurve, best_model, fit, make_learner
from mlds.models import make_network
from mlds.phantoms.oct import OCT_CLASSES, oct_phantoms
from mlds.study.runs import Run, read_run
from mlds.task import Task
from mlds.teacher import MeanTeacher


class Noisy:
    def __len__(self): return 32
    def __getitem__(self, i): return torch.randn(1, 8, 8) + random.random() + np.random.rand(), torch.tensor(i % 2)


class Tell(Callback):
    "Report every training batch, and stop there for good where told to."
    def __init__(self, pipe, hang, pause): self.pipe, self.hang, self.pause = pipe, hang, pause
    def after_batch(self):
        if not self.training: return
        time.sleep(self.pause)
        self.pipe.send((self.epoch, self.iter))
        if (self.epoch, self.iter) == self.hang: time.sleep(60)


def digest(tensors): return hashlib.sha256(b''.join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()

def train(pipe, root, seed, workers, hang, pause):
    os.setsid()
    torch.set_num_threads(1)
    run = Run(root, 'resume', {'workers': workers}, {'sha256': 'c0ffee'}).start()
    set_seed(seed)
    dls = DataLoaders(*[DataLoader(Noisy(), bs=8, shuffle=s, num_workers=workers) for s in (True, False)])
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.3), nn.Flatten(),
                        nn.Linear(144, 2))
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), cbs=MeanTeacher())
    learn.remove_cb(ProgressCallback); learn.logger = noop
    learn.fit_one_cycle(4, .01, cbs=[Checkpoint(run.work/'checkpoint.pt'), Tell(pipe, hang, pause)])
    adam = [v for s in learn.opt.state_dict()['state'] for v in s.values() if isinstance(v, torch.Tensor)]
    run.finish({'student': digest(net.state_dict().values()), 'teacher': digest(learn.teacher.state_dict().values()),
                'adam': digest(adam), 'lr': learn.opt.hypers[0]['lr'],
                'losses': torch.stack(list(learn.recorder.losses)),
                'values': [list(v) for v in learn.recorder.values], 'next': random.random()})


def start(root, seed=0, workers=0, hang=None, pause=0):
    "A training in a process group of its own, and the pipe through which it reports its batches."
    fork = multiprocessing.get_context('fork')
    listen, tell = fork.Pipe(duplex=False)
    p = fork.Process(target=train, args=(tell, root, seed, workers, hang, pause))
    p.start(); tell.close()
    return p, listen

def batches(listen):
    try:
        while True: yield listen.recv()
    except EOFError: return

def finish(root, **kwargs):
    p, listen = start(root, **kwargs)
    seen = list(batches(listen)); p.join()
    assert p.exitcode == 0
    return records(root)[0]['metrics'], seen

def records(root): return [read_run(f.parent) for f in root.glob('*/run.json')]

def kill(p): os.killpg(p.pid, signal.SIGKILL); p.join()


@pytest.mark.parametrize('workers', [0, 2])
def test_killed_and_continued(tmp_path, workers):
    p, listen = start(tmp_path/'torn', workers=workers, hang=(2, 1))
    for last in batches(listen):
        if last == (2, 1): break
    kill(p)
    assert records(tmp_path/'torn') == []
    continued, seen = finish(tmp_path/'torn', seed=1, workers=workers)
    straight, _ = finish(tmp_path/'straight', workers=workers)
    assert seen[0] == (2, 0) and len(seen) == 8
    assert continued == straight
    assert len(straight['losses']) == 16 and len(straight['values']) == 4
    assert finish(tmp_path/'other', seed=1, workers=workers)[0] != straight


def test_killed_again_and_again(tmp_path):
    "Wherever it strikes, in a batch, while a checkpoint is written or before there is one, the end is the same."
    moments, killed = random.Random(0), 0
    for _ in range(8):
        p, listen = start(tmp_path/'torn', pause=.04)
        assert listen.poll(30)
        p.join(moments.uniform(0, .3))
        if not p.is_alive(): break
        kill(p); killed += 1
    assert killed >= 3
    if not records(tmp_path/'torn'): finish(tmp_path/'torn')
    assert records(tmp_path/'torn')[0]['metrics'] == finish(tmp_path/'straight')[0]


class Stop(Callback):
    "Pull the plug in the second epoch."
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == (1, 2): raise KeyboardInterrupt


def check_resumes(learner, tmp_path):
    "A learner that is interrupted ends with the weights of one that is not."
    def weights(file, *stop):
        set_seed(0)
        learn = learner([*stop])
        fit(learn, epochs=2, checkpoint=tmp_path/file, bar=False)
        return best_model(learn).state_dict()

    straight = weights('a.pt')
    with pytest.raises(KeyboardInterrupt): weights('b.pt', Stop())
    resumed = weights('b.pt')
    assert all(torch.equal(v, resumed[k]) for k, v in straight.items())


@pytest.fixture(scope='module')
def scans():
    rows = oct_phantoms(volumes=6, scans=3, size=64)
    return split_groups(Catalogue(rows.assign(annotation=rows['mask'].map(Mask)), Task(OCT_CLASSES)))


def test_a_training_on_class_sets_resumes_bit_for_bit(tmp_path, scans):
    "With fastai's random transforms, quotas, pseudo-labels and a teacher: the batch order and every draw must go on."
    few = simulate_budget(scans, 3, 'boxes')

    def learner(cbs):
        dls = make_dataloaders(few, bs=4, iterations=4, seed=0)
        return make_learner(dls, network=dict(width=4, depth=3, head_width=8), teaching=dict(start=.2), cbs=cbs)

    check_resumes(learner, tmp_path)


def test_adapters_and_their_curve_resume_bit_for_bit(tmp_path, scans):
    few, points = simulate_budget(scans, 4, by='groups'), []

    def learner(cbs):
        start = make_network(scans.task, 'test_resnet', width=4, head_width=8)
        curve = ScoreCurve(2)
        points.append(curve)
        dls, teaching = make_dataloaders(few, bs=2, iterations=4, seed=0), dict(augment=False)
        return make_learner(dls, start=start, tune='adapters', teacher='none', teaching=teaching, cbs=[curve, *cbs])

    check_resumes(learner, tmp_path)
    straight, _, resumed = points
    assert straight.points == resumed.points and len(straight.points) == 5


def test_a_classifier_resumes_bit_for_bit(tmp_path, scans):
    fluids = Catalogue(scans, Task(['IRF', 'SRF'], unit='image'))

    def learner(cbs):
        dls = make_dataloaders(fluids, bs=4, iterations=4, seed=0)
        return make_learner(dls, network=dict(encoder='test_resnet'), cbs=cbs)

    check_resumes(learner, tmp_path)
