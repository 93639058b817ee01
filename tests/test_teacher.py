("The teacher against timm's moving average, step by step; skipped steps, checkpoints, interruptions; "
 "its labels within the loop.")
import io, random

import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException, CancelStepException, CancelValidException
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import Learner
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from timm.utils import ModelEmaV3
from torch import nn

from mlds.annotations import Mask, weaken
from mlds.checkpoints import Checkpoint
from mlds.classsets import MAX_CLASSES, ClassSets, class_sets
from mlds.learner import best_model
from mlds import pseudolabels
from mlds.phantoms.oct import OCT_CLASSES, oct_phantoms
from mlds.pseudolabels import PseudoLabels, StrongAugment, cut_mix, prune_candidates, ramp_up, random_boxes
from mlds.supervision import MixedLoss
from mlds.task import Task
from mlds.teacher import MeanTeacher
from mlds.unet import Prediction

torch.set_num_threads(1)


class Spots:
    def __init__(self, n): self.x, self.y = torch.randn(n, 1, 6, 6), torch.randint(0, 2, (n,))
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.y[i]


def learner(*cbs, decay=.9, validate=True, lr=.05):
    set_seed(0)
    dls = DataLoaders(DataLoader(Spots(24), bs=4), DataLoader(Spots(8), bs=4))
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(.2), nn.Flatten(),
                        nn.Linear(48, 2))
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), lr=lr, cbs=[MeanTeacher(decay, validate), *cbs])
    return learn.remove_cb(ProgressCallback)


def fit(learn, n=2, **kwargs):
    with learn.no_logging(): learn.fit(n, **kwargs)
    return learn


class Beside(Callback):
    "timm's average, updated by hand after each step that was taken; compares at once."
    order = 50
    def __init__(self, decay): self.decay, self.steps, self.compared = decay, 0, 0
    def before_fit(self):
        if self.steps: return
        self.average = ModelEmaV3(self.learn.model, self.decay, use_warmup=True, dtype=torch.float32)
    def before_batch(self):
        if self.training: self.before = [p.detach().clone() for p in self.learn.model.parameters()]
    def after_batch(self):
        if not self.training: return
        if any(not torch.equal(a, b) for a, b in zip(self.before, self.learn.model.parameters())):
            self.steps += 1
            self.average.update(self.learn.model, self.steps)
        theirs, ours = self.average.module.state_dict(), self.learn.teacher.state_dict()
        assert theirs.keys() == ours.keys()
        for k in theirs: torch.testing.assert_close(ours[k], theirs[k], rtol=0, atol=0, msg=k)
        self.compared += 1


class Skip(Callback):
    "Skips every third step, as mixed precision does when gradients overflow."
    order = 10
    def before_step(self):
        if self.learn.train_iter % 3 == 0: raise CancelStepException


@pytest.mark.parametrize('decay', [0., .5, .9, .999])
@pytest.mark.parametrize('extra', [(), (Skip,)])
def test_equals_timm_at_every_step(decay, extra):
    beside = Beside(decay)
    learn = fit(learner(beside, *(e() for e in extra), decay=decay))
    assert beside.compared == 12 and learn.mean_teacher.steps == beside.steps == (8 if extra else 12)
    buffers = dict(learn.teacher.named_buffers())
    assert not torch.equal(buffers['1.running_mean'], torch.zeros(3))
    if decay: assert not torch.equal(learn.teacher[0].weight, learn.model[0].weight)


def test_a_second_fit_goes_on():
    beside = Beside(.9)
    learn = fit(fit(learner(beside), 1), 1)
    assert beside.compared == 12 and learn.mean_teacher.steps == 12


class Overflow(Callback):
    "What the scaler of mixed precision does: it cancels steps. Notes the teacher before and after."
    order = 10
    def __init__(self): self.same = []
    def before_step(self):
        self.was = [v.clone() for v in self.learn.teacher.state_dict().values()]
        self.cancel = self.learn.train_iter % 2 == 1
        if self.cancel: raise CancelStepException
    def after_batch(self):
        if not self.training: return
        now = self.learn.teacher.state_dict().values()
        self.same.append((self.cancel, all(map(torch.equal, self.was, now))))


def test_a_skipped_step_leaves_the_teacher_alone():
    overflow = Overflow()
    fit(learner(overflow))
    assert overflow.same == [(bool(i % 2), bool(i % 2)) for i in range(12)]


def test_accumulated_gradients_make_one_step():
    learn = fit(learner(GradientAccumulation(8)))
    assert learn.mean_teacher.steps == 6


class Stop(Callback):
    "Ends the program in an epoch."
    order = 60
    def __init__(self, epoch, when): self.at, self.when = epoch, when
    def before_batch(self):
        if self.epoch == self.at and self.training == (self.when == 'training'): raise KeyboardInterrupt


@pytest.mark.parametrize('when', ['training', 'validation'])
def test_checkpoint_round_trip(tmp_path, when):
    ("Interrupted in the second of three epochs and continued by a new learner: "
     "the same teacher and student to the last bit.")
    whole = fit(learner(Checkpoint(tmp_path/'whole.pt')), 3)
    with pytest.raises(KeyboardInterrupt): fit(learner(Checkpoint(tmp_path/'a.pt'), Stop(1, when)), 3)
    again = fit(learner(Checkpoint(tmp_path/'a.pt')), 3)
    assert again.mean_teacher.steps == whole.mean_teacher.steps == 18
    for a, b in ((whole.teacher, again.teacher), (whole.model, again.model)):
        for k, v in a.state_dict().items(): assert torch.equal(v, b.state_dict()[k]), k


def test_state_round_trip():
    learn, other = fit(learner()), learner()
    buffer = io.BytesIO()
    torch.save(learn.mean_teacher.state_dict(), buffer)
    buffer.seek(0)
    other.mean_teacher.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.mean_teacher.steps == 12
    for k, v in learn.teacher.state_dict().items(): assert torch.equal(v, best_model(other).state_dict()[k])


class Who(Callback):
    "Which network works in training and in validation."
    def __init__(self): self.seen = set()
    def before_batch(self):
        model = self.learn.model
        self.seen.add((self.training, 'teacher' if model is self.learn.teacher else 'student', model.training))


@pytest.mark.parametrize('validate', [True, False])
def test_who_validates(validate):
    who = Who()
    learn = fit(learner(who, validate=validate))
    assert who.seen == {(True, 'student', True), (False, 'teacher' if validate else 'student', False)}
    assert learn.model is not learn.teacher and best_model(learn) is learn.teacher


class Cancel(Callback):
    order = 60
    def before_batch(self):
        if not self.training: raise CancelValidException


def test_the_student_is_back_after_a_broken_validation():
    learn = fit(learner(Cancel()))
    assert learn.model is not learn.teacher
    learn = learner(Stop(0, 'validation'))
    with pytest.raises(KeyboardInterrupt): fit(learn)
    student = learn.mean_teacher.student
    learn.remove_cb(Stop)
    fit(learn, 1)
    assert learn.model is student is not learn.teacher and learn.mean_teacher.steps == 12


def test_the_teacher_stays_in_full_precision():
    learn = learner()
    learn.model.to(torch.bfloat16)
    class Half(Callback):
        def before_batch(self): self.learn.xb = tuple(x.to(next(self.model.parameters()).dtype) for x in self.xb)
        def after_pred(self): self.learn.pred = self.pred.float()
    learn.add_cb(Half())
    fit(learn)
    assert {v.dtype for v in learn.teacher.state_dict().values() if v.is_floating_point()} == {torch.float32}
    assert next(learn.model.parameters()).dtype == torch.bfloat16


def test_the_teacher_needs_no_gradient():
    class Probe(Callback):
        def after_backward(self): assert all(p.grad is None for p in self.learn.teacher.parameters())
    fit(learner(Probe()))


def test_looking_for_a_learning_rate_leaves_no_trace(tmp_path):
    ("fastai's lr_find puts the student back; "
     "a teacher that kept the average of a diverging training would not be one of this student.")
    learn = learner()
    learn.path = tmp_path
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=12, show_plot=False)
    average = learn.mean_teacher.ema
    if average is not None:
        ours = average.module.state_dict()
        for k, v in learn.model.state_dict().items(): torch.testing.assert_close(ours[k], v, msg=k)
    assert learn.mean_teacher.steps == 0


@pytest.mark.parametrize('decay', [-.1, 1., 2, float('nan')])
def test_impossible_decays(decay):
    with pytest.raises(ValueError, match='decay'): MeanTeacher(decay)


# the teacher at work: PseudoLabels

class Fields:
    "Images of which the first two of four have a mask and the others are open between two classes."
    def __init__(self):
        self.x, labels = torch.randn(4, 1, 8, 8), torch.randint(0, 3, (4, 8, 8))
        masked = torch.arange(4)[:, None, None] < 2
        self.y = class_sets(*(torch.where(masked, 1 << labels, torch.tensor(v)) for v in (0, 0b011)))
    def __len__(self): return 4
    def __getitem__(self, i): return self.x[i], self.y[i]


class Sensitive(nn.Module):
    ("A network whose answer depends on every pixel (an odd function, so no class wins everywhere), on dropout, "
     "and on who is asked.")
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.Tanh(), nn.Dropout(.5),
                                    nn.Conv2d(8, 3, 1, bias=False))
    def forward(self, x):
        z = self.layers(x)
        return Prediction(z, [z])


class Watch(Callback):
    "What loss and network get, before and after the pseudo-labels and the perturbation."
    order, run_valid = 19, False
    def __init__(self): self.before, self.after, self.images = [], [], []
    def before_batch(self): self.before.append((self.learn.pct_train, self.x.clone(), ClassSets(self.y.clone())))
    def after_pred(self): self.after.append(ClassSets(self.y.clone())); self.images.append(self.x.clone())
    def before_backward(self): assert self.model.training


def labelled(source='teacher', start=.5, ramp=0., cbs=()):
    set_seed(0)
    dls = DataLoaders(*[DataLoader(Fields(), bs=4) for _ in range(2)])
    dls.task = Task(('background', 'a', 'b'))
    watch, labels = Watch(), PseudoLabels(source, threshold=0., start=start, ramp=ramp)
    teacher = [MeanTeacher(.9)] if source == 'teacher' else []
    learn = Learner(dls, Sensitive(), loss_func=MixedLoss(dls.task), lr=.1, cbs=[*teacher, watch, labels, *cbs])
    fit(learn.remove_cb(ProgressCallback), 8)
    return learn, watch


def decided(sets): return sets.known[2:].all((1, 2))


@pytest.mark.parametrize('source', ['teacher', 'self'])
def test_open_images_get_labels_from_the_start_on(source):
    learn, watch = labelled(source)
    for (progress, _, before), after in zip(watch.before, watch.after, strict=True):
        assert torch.equal(after[:2], before[:2]), 'masks stay as they are'
        if progress < .5: assert torch.equal(after, before)
        else: assert decided(after).all() and not (after.possible[2:] & ~0b011).any()


@pytest.mark.parametrize('source', ['teacher', 'self'])
def test_who_labels_and_what_it_sees(source):
    "The teacher, or the student itself, in evaluation mode, on the image before it is perturbed."
    class Answer(Callback):
        order = 18
        def __init__(self): self.said = []
        def before_batch(self):
            if not self.training: return
            net = self.learn.teacher if source == 'teacher' else self.learn.model
            with torch.no_grad(): p = net.eval()(self.x)[0].softmax(1)
            if source == 'self': net.train()
            self.said.append(1 << (p * torch.tensor([1., 1, 0])[:, None, None]).argmax(1))
    learn, watch = labelled(source, start=0., cbs=[Answer(), StrongAugment(cutmix=0)])
    for said, after, (_, x, _), image in zip(learn.answer.said, watch.after, watch.before, watch.images, strict=True):
        assert torch.equal(after.certain[2:], said[2:]) and len(said[2:].unique()) == 2 and not torch.equal(x, image)


def test_the_share_of_images_grows():
    def count(watch): return sum(decided(after).sum().item() for after in watch.after)
    random_share = [count(labelled(start=s, ramp=r)[1]) for s, r in ((1.1, 0.), (0., 1.), (0., 0.))]
    assert random_share[0] == 0 < random_share[1] < random_share[2] == 16


@pytest.mark.parametrize('progress, share', [(0, 0), (.2, 0), (.3, .5), (.4, 1), (1, 1)])
def test_ramp_up(progress, share): assert ramp_up(progress, start=.2, ramp=.2) == pytest.approx(share)

@pytest.mark.parametrize('progress, share', [(.19, 0), (.2, 1), (1, 1)])
def test_no_ramp_is_a_step(progress, share): assert ramp_up(progress, start=.2, ramp=0) == share


@pytest.mark.parametrize('drawn, share, chosen', [
    (0., 0., False), (.5, .5, False), (.4999, .5, True), (.9999, 1., True)])
def test_an_image_is_chosen_with_the_ramps_probability(monkeypatch, drawn, share, chosen):
    "`random()` is in [0, 1): at a share of 0 no image may be chosen, at 1 every one must be."
    monkeypatch.setattr(pseudolabels, 'ramp_up', lambda *_: share)
    monkeypatch.setattr(random, 'random', lambda: drawn)
    learn, watch = labelled()
    assert {decided(after).all().item() for after in watch.after} == {chosen}


@pytest.mark.parametrize('p, certain, possible', [
    (0, 0, 0), (.25, 0, 0), (.2501, 0, 1), (.5, 0, 1), (.7499, 0, 1), (.75, 1, 1), (1, 1, 1)])
def test_thresholds_of_overlapping_classes(p, certain, possible):
    "At the threshold for, at one minus the threshold against; in between open."
    open_ = class_sets(torch.tensor([[[0b01]]]), torch.tensor([[[0b11]]]))
    out = prune_candidates(open_, torch.tensor([.5, p]).view(1, 2, 1, 1), threshold=.75, overlapping=True)
    assert (out.certain.item() >> 1, out.possible.item() >> 1) == (certain, possible)


@pytest.mark.parametrize('overlapping', [False, True])
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_diverged_teacher_is_refused(overlapping, bad):
    open_ = class_sets(torch.zeros(1, 1, 1).long(), torch.full((1, 1, 1), 0b11))
    with pytest.raises(ValueError, match='lower the learning rate'):
        prune_candidates(open_, torch.tensor([.5, bad]).view(1, 2, 1, 1), overlapping=overlapping)


def augmented(x, seed=0, **strengths):
    augment = StrongAugment(**(dict(contrast=0., brightness=0., noise=0.) | strengths))
    torch.manual_seed(seed)
    return augment.perturb(x)

def drawn(n, seed=0):
    "Contrast, brightness and noise of each image, in -1..1, as the callback draws them first."
    torch.manual_seed(seed)
    return torch.rand(3, n, 1, 1, 1)*2 - 1

def test_signs_of_the_augmentation():
    ("A positive draw raises contrast and brightness, a negative one lowers them; "
     "noise is added, and its strength is a size.")
    x = torch.randn(5, 1, 6, 7)
    gain, shift, noise = drawn(5)
    assert (gain > 0).any() and (gain < 0).any() and (shift > 0).any() and (shift < 0).any() and (noise < 0).any()
    torch.testing.assert_close(augmented(x, contrast=.3), x * (1 + .3*gain))
    torch.testing.assert_close(augmented(x, brightness=.4), x + .4*shift)
    drawn(5)
    added = torch.randn_like(x)
    torch.testing.assert_close(augmented(x, noise=.2), x + .2*noise.abs()*added)

def test_augmentation_of_channels_is_that_of_the_image():
    x = torch.ones(4, 3, 5, 5)
    out = augmented(x, contrast=.3, brightness=.4)
    assert torch.equal(out, out[:, :1, :1, :1].expand_as(x)) and len(out[:, 0, 0, 0].unique()) == 4

def test_default_strengths():
    augment = StrongAugment()
    assert (augment.contrast, augment.brightness, augment.noise, augment.cutmix) == (.25, .25, .2, .5)


def test_overlapping_tasks_have_sigmoids():
    "The probabilities, and so the labels, are those of the task."
    learn, _ = labelled(start=2.)
    x = Fields().x
    learn.dls.task = Task(('background', 'a', 'b'), overlapping=True)
    learn.pseudo_labels.learn = learn
    logits = learn.teacher.eval()(x)[0]
    torch.testing.assert_close(learn.pseudo_labels.predict(x), logits.sigmoid())


@pytest.mark.parametrize('threshold, possible', [
    (.25, 0b001), (.5, 0b001), (.5001, 0b011), (.75, 0b011), (.7501, 0b111), (1., 0b111)])
def test_candidates_are_kept_until_their_shares_reach_the_threshold(threshold, possible):
    open_ = class_sets(torch.zeros(1, 1, 1).long(), torch.full((1, 1, 1), 0b111))
    out = prune_candidates(open_, torch.tensor([.5, .25, .25]).view(1, 3, 1, 1), threshold)
    assert out.possible.item() == possible and out.certain.item() == (possible if possible == 1 else 0)


def annotated_truth(n, kind, size=32):
    "Label images and what an annotation of a kind says of them."
    masks = [m for m in oct_phantoms(volumes=n, scans=1, size=size, seed=3)['mask']]
    sets = torch.stack([weaken(Mask(m), kind, len(OCT_CLASSES)).class_sets((size, size), len(OCT_CLASSES))
                        for m in masks])
    return torch.stack([torch.as_tensor(m).long() for m in masks]), ClassSets(sets)

@pytest.mark.parametrize('kind', ['image labels', 'boxes', 'tight boxes', 'loose boxes', 'points', 'scribbles',
                                  'extreme points', 'unlabelled'])
def test_mixed_images_are_annotated_truthfully(kind):
    "Truth mixed in the same way holds what is certain, is possible, and has its class in every region that is left."
    truth, sets = annotated_truth(12, kind)
    torch.manual_seed(0)
    partners, box = torch.randperm(12), random_boxes(12, (32, 32), .8)
    images, mixed = cut_mix(truth[:, None].float(), sets, partners, box)
    truth = images[:, 0].long()
    assert (mixed.certain & ~(1 << truth) == 0).all() and (mixed.possible >> truth & 1).all()
    n, present = len(OCT_CLASSES), 0
    for regions, labels in zip(mixed.regions, truth):
        for k in range(n * (MAX_CLASSES//n)):
            inside = (regions >> k & 1).bool()
            assert not inside.any() or (labels[inside] == k % n).any()
            present += inside.any().item()
    kept = box.flatten(1).any(1)
    assert torch.equal(mixed[~kept], sets[~kept]) and bool(present) == (sets.regions != 0).any().item()

def test_annotated_images_keep_their_grey_values():
    "Before pseudo-labels come and after, what was open is perturbed, and nothing else."
    learn, watch = labelled('teacher', start=.5, cbs=[StrongAugment(cutmix=0)])
    for (_, x, _), image in zip(watch.before, watch.images, strict=True):
        assert torch.equal(x[:2], image[:2]) and not (x[2:] == image[2:]).flatten(1).all(1).any()

def test_boxes_come_from_images_of_the_same_sort():
    learn, watch = labelled('teacher', start=.5, cbs=[StrongAugment(0, 0, 0, cutmix=1)])
    for sort in (slice(0, 2), slice(2, 4)):
        pairs = [(x[sort], image[sort]) for (_, x, _), image in zip(watch.before, watch.images, strict=True)]
        mixed = [(x != image).any().item() for x, image in pairs]
        assert any(mixed) and all(torch.isin(image, x).all() for x, image in pairs)
