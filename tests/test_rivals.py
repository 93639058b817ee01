"Published methods resume bit for bit, and say what they cannot do."
import pytest
import torch

from mlds.annotations import Mask
from mlds.catalogue import Catalogue, simulate_budget, split_groups
from mlds.checkpoints import Checkpoint
from mlds.dataloaders import make_dataloaders
from mlds.learner import make_learner, mixed_precision
from mlds.phantoms.oct import OCT_CLASSES, oct_phantoms
from mlds.rivals import RIVALS, rival_callbacks
from mlds.task import Task
from test_resume import check_resumes


@pytest.fixture(scope='module')
def few():
    rows = oct_phantoms(volumes=6, scans=3, size=64)
    full = split_groups(Catalogue(rows.assign(annotation=rows['mask'].map(Mask)), Task(OCT_CLASSES)))
    return simulate_budget(full, 3, 'unlabelled')

def learner(few, name, cbs):
    "As the experiments ask for it: by name."
    dls = make_dataloaders(few, bs=4, iterations=4, seed=0)
    learn = make_learner(dls, network=dict(width=4, depth=3, head_width=8), teacher=name, cbs=cbs)
    there = {type(cb) for cb in learn.cbs}
    assert all(type(cb) in there for cb in rival_callbacks(name))
    return learn


@pytest.mark.parametrize('name', RIVALS)
def test_a_rival_resumes_bit_for_bit(tmp_path, few, name):
    learners = []

    def kept(cbs):
        learners.append(learner(few, name, cbs))
        return learners[-1]

    check_resumes(kept, tmp_path)
    seconds = [l.cross_pseudo_supervision.second for l in learners if hasattr(l, 'cross_pseudo_supervision')]
    assert bool(seconds) == (name == 'cross pseudo supervision')
    for straight, torn, resumed in zip(*[n.state_dict().values() for n in seconds]):
        assert torch.equal(straight, resumed)

@pytest.mark.parametrize('name', RIVALS)
def test_bf16(few, name):
    learn = learner(few, name, mixed_precision('bf16'))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, .01)
    assert torch.stack(list(learn.recorder.losses)).isfinite().all()

def test_a_checkpoint_of_one_rival_is_not_that_of_another(tmp_path, few):
    def train(name):
        learn = learner(few, name, [Checkpoint(tmp_path/'c.pt')])
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
    train('unimatch')
    with pytest.raises(ValueError, match='uni_match there, fix_match here'): train('fixmatch')
