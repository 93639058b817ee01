"Losses of `mlds.supervision` against the published formula, plain loops, and each other."
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor

from mlds.annotations import Boxes, Mask, weaken
from mlds.classsets import MAX_CLASSES, TIGHT, ClassSets, class_sets, from_labels, nothing_known, pyramid, unpack
from mlds.supervision import (AUX_SUPERVISION, MixedLoss, _log_probs, candidate_nll, certain_share, in_regions,
                              list_regions, mil_loss, mlds_loss, nearest_loss, soft_dice_loss, upsample_loss)
from mlds.task import Task
from mlds.unet import Prediction, UNet

check = lambda *strategies, n=40: lambda f: settings(max_examples=n, deadline=None)(given(*strategies)(f))
torch.set_num_threads(1)
seeds, strides = st.integers(0, 2**31), (16, 8, 4, 2, 1)
sixteens = st.integers(1, 4).map(lambda n: 16*n)
multilabel = ('mlds-sigmoid', 'mlds-softmax')
def classes(n, overlapping=False): return Task(('background', *(f'class {c}' for c in range(1, n))), overlapping)


def generator(seed): return torch.Generator().manual_seed(seed)
def blobs(seed, b, h, w, c):
    coarse = torch.randint(0, c, (b, -(-h//5), -(-w//5)), generator=generator(seed))
    return coarse.repeat_interleave(5, 1).repeat_interleave(5, 2)[:, :h, :w]

def random_prediction(seed, b, h, w, c, scale=1.):
    g = generator(seed)
    logits = lambda s: (torch.randn(b, c, -(-h//s), -(-w//s), generator=g) * scale).requires_grad_()
    return Prediction(logits(1), [logits(s) for s in strides])

OLD_KINDS = ('mask', 'boxes', 'image labels', 'unlabelled')

def mixed_sets(seed, h, w, c, kinds=OLD_KINDS):
    "One image of each kind."
    labels = blobs(seed, len(kinds), h, w, c)
    return ClassSets(torch.stack([weaken(Mask(m.numpy()), k, c).class_sets((h, w), c) for m, k in zip(labels, kinds)]))

def weight(sets):
    "What a batch of three classes that exclude each other is divided by: its decided pixels, in images, at least half of one."
    return max(sets.known.flatten(1).float().mean(1).sum().item(), .5)

def gradients(loss, pred): return torch.autograd.grad(loss, [pred.logits, *pred.aux_logits], allow_unused=True)


def published(pred, labels, activation):
    ("Paper 1 in double precision: max-pooled one-hot targets; BCE averaged over classes and cells, "
     "summed over batch and heads; cross-entropy.")
    c = pred.logits.shape[1]
    one_hot = F.one_hot(labels, c).permute(0, 3, 1, 2).double()
    squash = torch.sigmoid if activation == 'sigmoid' else lambda x: x.softmax(1)
    def head(h):
        target = F.adaptive_max_pool2d(one_hot, h.shape[-2:])
        return F.binary_cross_entropy(squash(h.double()), target, reduction='none').mean((1, 2, 3)).sum()
    heads = sum(head(h) for h in pred.aux_logits)
    return F.cross_entropy(pred.logits.double(), labels) + heads


@check(seeds, st.integers(1, 3), sixteens, sixteens, st.integers(2, 14), st.sampled_from(['sigmoid', 'softmax']))
def test_published_formula(seed, b, h, w, c, activation):
    pred, labels = random_prediction(seed, b, h, w, c), blobs(seed, b, h, w, c)
    loss = MixedLoss(classes(c), f'mlds-{activation}', dice=0, mil=0, reduction='sum')(pred, from_labels(labels, c))
    torch.testing.assert_close(loss.double(), published(pred, labels, activation), rtol=1e-6, atol=0)


@check(seeds, sixteens, sixteens, st.sampled_from(['sigmoid', 'softmax']), n=10)
def test_published_gradients(seed, h, w, activation):
    pred, labels = random_prediction(seed, 2, h, w, 4), blobs(seed, 2, h, w, 4)
    loss = MixedLoss(classes(4), f'mlds-{activation}', dice=0, mil=0, reduction='sum')(pred, from_labels(labels, 4))
    ours, theirs = gradients(loss, pred), gradients(published(pred, labels, activation), pred)
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_mean_is_the_sum_over_what_is_decided():
    pred, sets = random_prediction(0, 4, 32, 48, 3), mixed_sets(0, 32, 48, 3)
    mean, total = MixedLoss(classes(3)), MixedLoss(classes(3), reduction='sum')
    mean(pred, sets), total(pred, sets)
    torch.testing.assert_close(weight(sets)*mean.parts['aux'], total.parts['aux'])
    for k in ('mask', 'dice', 'mil'): torch.testing.assert_close(mean.parts[k], total.parts[k])


@check(seeds, st.floats(0, 3), st.floats(0, 3), st.floats(0, 3), n=10)
def test_the_weights_weigh(seed, aux_weight, dice, mil):
    pred, sets = random_prediction(seed, 4, 16, 32, 3), mixed_sets(seed, 16, 32, 3)
    one = MixedLoss(classes(3))
    one(pred, sets)
    loss = MixedLoss(classes(3), aux_weight=aux_weight, dice=dice, mil=mil)(pred, sets)
    expect = one.parts['mask'] + aux_weight*one.parts['aux'] + dice*one.parts['dice'] + mil*one.parts['mil']
    torch.testing.assert_close(loss, expect)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('aux', AUX_SUPERVISION)
def test_gradients_are_finite_under_autocast(aux, dtype):
    torch.manual_seed(0)
    model, sets = UNet(1, 4, width=4, depth=3, head_width=4), mixed_sets(1, 33, 47, 4)
    with torch.autocast('cpu', dtype): loss = MixedLoss(classes(4), aux)(model(torch.randn(4, 1, 33, 47)), sets)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    reached = {n.split('.')[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached >= {'encoder', 'decoder', 'mask_head'} and ('aux_heads' in reached) == (aux != 'none')


@check(seeds, st.sampled_from([1., 100., 1e4]), st.sampled_from([torch.bfloat16, torch.float16]),
       st.sampled_from(AUX_SUPERVISION), n=40)
def test_gradients_are_finite_for_logits_of_any_size(seed, scale, dtype, aux):
    pred, sets = random_prediction(seed, 4, 16, 16, 4, scale), mixed_sets(seed, 16, 16, 4)
    low = Prediction(pred.logits.to(dtype), [h.to(dtype) for h in pred.aux_logits])
    loss = MixedLoss(classes(4), aux)(low, sets)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients(loss, pred) if g is not None)


@check(seeds, st.integers(1, 40), st.integers(1, 40), st.sampled_from(AUX_SUPERVISION))
def test_unknown_pixels_have_no_gradient(seed, h, w, aux):
    "A masked image of which a part is unknown, beside one without annotation."
    unknown = blobs(seed+1, 1, h, w, 2)[0].bool()
    mask, nothing = (s.as_subclass(Tensor) for s in (from_labels(blobs(seed, 1, h, w, 3)[0], 3), nothing_known((h, w))))
    sets = ClassSets(torch.stack([torch.where(unknown, nothing, mask), nothing]))
    pred = random_prediction(seed, 2, h, w, 3)
    full, *heads = gradients(MixedLoss(classes(3), aux)(pred, sets), pred)
    assert not full[1].any() and not full[0][:, unknown].any()
    if not unknown.all(): assert full[0][:, ~unknown].any()
    for grad, level in zip(heads, pyramid(sets, [x.shape[-2:] for x in pred.aux_logits], 3)):
        assert grad is None or not grad[1].any()
        if aux in multilabel: assert not grad[0][:, level.possible[0] & ~level.certain[0] & 7 == 7].any()


@check(seeds, st.integers(2, 5), st.integers(1, 9), st.integers(1, 9))
def test_candidate_nll_is_the_log_of_a_sum(seed, c, h, w):
    logits = torch.randn(2, c, h, w, generator=generator(seed))
    possible = torch.randint(1, 1 << c, (2, h, w), generator=generator(seed))
    p = (logits.double().softmax(1) * unpack(possible, c)).sum(1)
    torch.testing.assert_close(candidate_nll(logits, possible).double(), -p.log(), rtol=1e-5, atol=1e-6)


@check(seeds, st.integers(2, 6), st.floats(.1, 8))
def test_log_probs(seed, c, scale):
    x = torch.randn(2, c, 3, 4, generator=generator(seed)) * scale
    for activation, p in (('sigmoid', x.double().sigmoid()), ('softmax', x.double().softmax(1))):
        log_p, log_q = _log_probs(x, activation)
        torch.testing.assert_close(log_p.double(), p.log(), rtol=1e-4, atol=1e-5)
        sure = p > 1-1e-4
        torch.testing.assert_close(log_q.double()[~sure], (1-p).log()[~sure], rtol=1e-3, atol=1e-5)
        assert (log_q[sure] < -9).all()


@check(seeds, st.integers(2, 20), st.integers(1, 8), st.integers(1, 8), st.integers(1, 4))
def test_region_loss_by_loops(seed, c, h, w, b):
    g = generator(seed)
    log_p = torch.randn(b, c, h, w, generator=g).log_softmax(1)
    regions = torch.ones(b, h, w, dtype=torch.long) * (1 << MAX_CLASSES//c*c) - 1
    for _ in range(5): regions &= torch.randint(0, 1 << MAX_CLASSES//c*c, (b, h, w), generator=g)
    held = lambda i, k: (regions[i] >> k & 1).bool()
    there = [(i, k) for i in range(b) for k in range(MAX_CLASSES) if held(i, k).any()]
    listed = list_regions(regions)
    assert list(zip(*(part.tolist() for part in listed))) == there
    terms = [-log_p[i, k % c][held(i, k)].max() for i, k in there]
    if terms: torch.testing.assert_close(mil_loss(in_regions(log_p, regions, listed)), torch.stack(terms).mean())


def test_regions_of_nothing():
    no_image, no_bit = torch.zeros(0, 4, 4, dtype=torch.long), torch.zeros(2, 3, 3, dtype=torch.long)
    assert [len(part) for part in (*list_regions(no_image), *list_regions(no_bit))] == [0]*4


@check(seeds, st.sampled_from(multilabel), n=10)
def test_regions_of_every_head(seed, aux):
    "The region part by loops: images and bits of the full-scale head and of each level; image labels and many boxes."
    c, kinds = 3, ('mask', 'image labels', 'boxes', 'boxes', 'unlabelled')
    pred, sets = random_prediction(seed, 5, 21, 34, c), mixed_sets(seed, 21, 34, c, kinds)
    loss = MixedLoss(classes(c), aux)
    loss(pred, sets)
    log_p = [pred.logits.log_softmax(1)] + [_log_probs(h, aux[5:])[0] for h in pred.aux_logits]
    regions = [sets.regions] + [l.regions for l in pyramid(sets, [h.shape[-2:] for h in pred.aux_logits], c)]
    held = lambda r, i, k: (r[i] >> k & 1).bool()
    def mean(p, r):
        there = [(i, k) for i in range(5) for k in range(MAX_CLASSES) if held(r, i, k).any()]
        return torch.stack([-p[i, k % c][held(r, i, k)].max() for i, k in there]).mean()
    torch.testing.assert_close(loss.parts['mil'], torch.stack([mean(p, r) for p, r in zip(log_p, regions)]).mean())


@check(seeds, st.sampled_from(AUX_SUPERVISION), st.integers(1, 40), st.integers(1, 40), n=25)
def test_a_batch_is_the_mean_of_what_its_images_decide(seed, aux, h, w):
    "All but Dice, whose sums run over the batch; the region part is a mean over regions, not images."
    pred, sets = random_prediction(seed, 4, h, w, 3), mixed_sets(seed, h, w, 3)
    loss = MixedLoss(classes(3), aux, dice=0)
    loss(pred, sets)
    together, alone = loss.parts, []
    for i in range(4):
        loss(Prediction(pred.logits[i:i+1], [x[i:i+1] for x in pred.aux_logits]), sets[i:i+1])
        alone.append(loss.parts | dict(n=len(list_regions(sets[i:i+1].regions)[0])))
    for part in ('mask', 'aux'):
        total = sum(a[part]*weight(sets[i:i+1]) for i, a in enumerate(alone))
        torch.testing.assert_close(together[part]*weight(sets), total)
    count = sum(a['n'] for a in alone)
    if count: torch.testing.assert_close(together['mil'], sum(a['n']*a['mil'] for a in alone)/count)
    else: assert together['mil'] == 0


@check(seeds, st.permutations(range(4)), st.sampled_from(AUX_SUPERVISION), n=15)
def test_the_order_of_a_batch_does_not_matter(seed, order, aux):
    pred, sets, loss = random_prediction(seed, 4, 20, 33, 3), mixed_sets(seed, 20, 33, 3), MixedLoss(classes(3), aux)
    turned = Prediction(pred.logits[order], [h[order] for h in pred.aux_logits])
    torch.testing.assert_close(loss(pred, sets), loss(turned, sets[order]))


@check(seeds, st.integers(2, 6))
def test_soft_dice_by_classes(seed, c):
    labels, logits = blobs(seed, 2, 11, 13, c), torch.randn(2, c, 11, 13, generator=generator(seed))
    known = blobs(seed+1, 2, 11, 13, 2).bool()
    mask, nothing = from_labels(labels, c).as_subclass(Tensor), nothing_known((11, 13)).as_subclass(Tensor)
    sets, p = ClassSets(torch.where(known[:, None], mask, nothing)), logits.softmax(1)
    masks = {k: known & (labels == k) for k in range(1, c)}
    by_class = [1 - (2*p[:, k][m].sum() + 1) / (p[:, k][known].sum() + m.sum() + 1)
                for k, m in masks.items() if m.any()]
    expect = torch.stack(by_class).mean() if by_class else torch.zeros(())
    torch.testing.assert_close(soft_dice_loss(logits, sets), expect)


def cells_of(n, s): return -(-n//s)

@pytest.mark.parametrize('stride', [2, 4, 8, 16])
def test_nearest_takes_the_centre_of_the_cell(stride):
    "For every image size: the cell (i, j) covers [i*stride, (i+1)*stride), as `crop_cells` leaves it."
    wrong = []
    for n in range(1, 70):
        cells = cells_of(n, stride)
        labels, logits = blobs(n, 1, n, n, 7), torch.randn(1, 7, cells, cells, generator=generator(n))
        centre = (torch.arange(cells)*stride + stride//2).clamp(max=n-1)
        expect = F.cross_entropy(logits, labels[:, centre[:, None], centre])
        if not torch.isclose(nearest_loss(logits, from_labels(labels, 7))[0], expect) and n > stride: wrong.append(n)
    assert not wrong, f'stride {stride}: other pixels than the centres for images of {wrong} pixels'


@pytest.mark.parametrize('stride', [2, 4, 8, 16])
def test_upsampling_keeps_cells_in_place(stride):
    wrong = []
    for n in range(1, 70):
        cells = cells_of(n, stride)
        labels, logits = blobs(n, 1, n, n, 7), torch.randn(1, 7, cells, cells, generator=generator(n))
        big = F.interpolate(logits, scale_factor=stride, mode='bilinear')[..., :n, :n]
        loss = upsample_loss(logits, from_labels(labels, 7))[0]
        if not torch.isclose(loss, F.cross_entropy(big, labels)): wrong.append(n)
    assert not wrong, f'stride {stride}: cells out of place for images of {wrong} pixels'


@check(seeds, st.sampled_from(multilabel))
def test_decided_pairs_alone_count(seed, aux):
    "Per cell and class: -log p where certain, -log (1-p) where impossible, nothing where open."
    h = torch.randn(3, 4, 5, 6, generator=generator(seed))
    bits = lambda i: torch.randint(0, 16, (3, 5, 6), generator=generator(seed+i))
    certain = bits(0) & bits(1)
    level = class_sets(certain, certain | bits(2))
    log_p, log_q = _log_probs(h, aux[5:])
    expect = torch.zeros(3)
    for b in range(3):
        for k in range(4):
            sure, never = level.certain[b] >> k & 1, 1 - (level.possible[b] >> k & 1)
            expect[b] -= (log_p[b, k][sure.bool()].sum() + log_q[b, k][never.bool()].sum()) / (4*5*6)
    torch.testing.assert_close(mlds_loss(h, level, aux[5:]), expect)


def test_many_boxes_and_many_classes():
    labels = torch.zeros(40, 40, dtype=torch.long)
    labels[::3, ::3] = torch.arange(14*14).view(14, 14) % 20
    sets = weaken(Mask(labels.numpy()), 'boxes', 20).class_sets((40, 40), 20)[None]
    pred = random_prediction(0, 1, 40, 40, 20)
    loss = MixedLoss(classes(20))(pred, sets)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients(loss, pred))


def test_one_class_is_refused_or_works():
    "Background alone: NaN is no answer."
    pred, sets = random_prediction(0, 1, 16, 16, 1), from_labels(torch.zeros(1, 16, 16, dtype=torch.long), 1)
    try: loss = MixedLoss(classes(1))(pred, sets)
    except ValueError as e: assert 'class' in str(e)
    else: assert loss.isfinite()


@pytest.mark.parametrize('bits', [0b000, 0b110])
def test_overlapping_masks(bits):
    "Of a pixel without any class, or with two: both known, so the loss is finite and asks for both classes or none."
    sets = class_sets(torch.full((1, 16, 16), bits))
    pred = random_prediction(0, 1, 16, 16, 3)
    try: loss = MixedLoss(classes(3))(pred, sets)
    except ValueError as e: assert 'class' in str(e); return
    assert loss.isfinite()
    grad = gradients(loss, pred)[0].sum((0, 2, 3))
    right = [(grad[k] < 0) == bool(bits >> k & 1) for k in range(3)]
    assert all(right), 'a class that is there must be asked for, one that is not must not'


@pytest.mark.parametrize('kwargs', [dict(aux_supervision='mlds'), dict(reduction='max')])
def test_unknown_options(kwargs):
    with pytest.raises(ValueError, match='is unknown: choose one of'): MixedLoss(classes(3), **kwargs)


AUX_LOSSES = {'nearest': nearest_loss, 'upsample': upsample_loss}

@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('aux', AUX_LOSSES)
def test_auxiliary_heads_are_told_what_was_asked_for(aux, reduction):
    "`nearest` is the loss at the cells' centres, `upsample` that of enlarged logits, and not the other way round."
    pred, sets = random_prediction(3, 4, 32, 48, 3), mixed_sets(3, 32, 48, 3)
    loss = MixedLoss(classes(3), aux, reduction=reduction)
    loss(pred, sets)
    total = lambda f: torch.stack([f(z, sets) for z in pred.aux_logits]).sum(0)
    scale = weight(sets) if reduction == 'mean' else 1
    parts = {k: total(f).sum()/scale for k, f in AUX_LOSSES.items()}
    torch.testing.assert_close(loss.parts['aux'], parts.pop(aux))
    other, = parts.values()
    assert not torch.isclose(loss.parts['aux'], other)


def test_overlapping_is_the_tasks_word():
    "The same interval, asked as one class a pixel and as several."
    pred, sets = random_prediction(5, 2, 16, 16, 3), from_labels(blobs(5, 2, 16, 16, 3), 3)
    single, several = MixedLoss(classes(3)), MixedLoss(classes(3, overlapping=True))
    single(pred, sets), several(pred, sets)
    one_hot = unpack(sets.certain, 3).float()
    torch.testing.assert_close(several.parts['mask'], F.binary_cross_entropy_with_logits(pred.logits, one_hot))
    torch.testing.assert_close(single.parts['mask'], F.cross_entropy(pred.logits, one_hot))
    torch.testing.assert_close(several.parts['aux'], single.parts['aux'])


def test_image_tasks_are_refused():
    with pytest.raises(ValueError, match='use MaskedBCE'): MixedLoss(Task(('oedema',), unit='image'))


@pytest.mark.parametrize('aux', ['nearest', 'upsample', 'mlds-softmax'])
def test_overlapping_classes_need_their_own_supervision(aux):
    with pytest.raises(ValueError, match='choose none or mlds-sigmoid'): MixedLoss(classes(3, overlapping=True), aux)


def test_pixels_without_a_class_are_refused():
    pred, sets = random_prediction(0, 1, 16, 16, 3), class_sets(torch.zeros(1, 16, 16, dtype=torch.long))
    with pytest.raises(ValueError, match='a pixel has no class'): MixedLoss(classes(3))(pred, sets)


@check(seeds, st.integers(1, 5), st.integers(0, 31))
def test_certain_share_by_loops(seed, c, among):
    target = torch.randint(1, 1 << c, (4, 5), generator=generator(seed))
    certain = target & torch.randint(0, 1 << c, (4, 5), generator=generator(seed+1))
    asked = [(i, j, k) for i in range(4) for j in range(5) for k in range(c) if among >> k & target[i, j] >> k & 1]
    pairs = [(certain[i, j] >> k & 1).item() for i, j, k in asked]
    share = certain_share(class_sets(certain, target), class_sets(target), among)
    assert share == pytest.approx(sum(pairs)/len(pairs)) if pairs else share != share


def test_soft_dice_counts_a_class_of_one_pixel():
    "Class 1 has one pixel, class 2 none: the mean is over class 1 alone."
    labels = torch.zeros(1, 6, 6, dtype=torch.long)
    labels[0, 2, 3] = 1
    p = torch.randn(1, 3, 6, 6, generator=generator(0)).softmax(1)
    loss = soft_dice_loss(p.log(), from_labels(labels, 3))
    torch.testing.assert_close(loss, 1 - (2*p[0, 1, 2, 3] + 1) / (p[0, 1].sum() + 1 + 1))
    labels[0, 4] = 2
    both = soft_dice_loss(p.log(), from_labels(labels, 3))
    of_two = 1 - (2*p[0, 2, 4].sum() + 1) / (p[0, 2].sum() + 6 + 1)
    torch.testing.assert_close(both, (loss + of_two)/2)


def test_pixels_of_a_tight_box_whose_region_was_cut_away():
    "As CutMix may leave them: there is no region to look for, and the loss stays a number."
    task = Task(['background', 'a', 'b'])
    sets = class_sets(torch.zeros(1, 8, 8).long(), torch.full((1, 8, 8), 0b011))
    cut = class_sets(sets.certain, sets.possible, torch.full((1, 8, 8), TIGHT))
    torch.manual_seed(0)
    pred = torch.randn(1, 3, 8, 8), [torch.randn(1, 3, 4, 4), torch.randn(1, 3, 2, 2)]
    loss = MixedLoss(task)
    assert torch.isfinite(loss(pred, cut)) and loss(pred, cut) == loss(pred, sets)
