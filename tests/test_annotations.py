("Whatever kind of annotation a mask is weakened to, at every level: certain classes are in the mask, "
 "the mask's classes are possible.")
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from mlds.annotations import (KINDS, Boxes, ClassMasks, ExtremePoints, ImageLabels, Interval, Mask, PartialMask, Points,
                              ProbabilityMaps, ScribbleImage, Scribbles, _check_box, boxes_of, fit_thresholds, weaken)
from mlds.classsets import (EVERYTHING, MAX_CLASSES, TIGHT, ClassSets, class_sets, encode, from_labels, pyramid, resize,
                            unpack)
from mlds.pseudolabels import prune_candidates

check = lambda *strategies, n=40: lambda f: settings(max_examples=n, deadline=None)(given(*strategies)(f))
torch.set_num_threads(1)
seeds, side, few = st.integers(0, 2**31), st.integers(1, 33), st.integers(2, 20)
FALSE = 'jittered boxes', 'loose jittered boxes', 'boxes as masks' # annotators' errors, and users'
TRUE = [k for k in KINDS if k not in FALSE]
kinds = st.sampled_from(TRUE)
sharpness = st.sampled_from(['mild', 'sure', 'flat'])


def random_labels(seed, h, w, c):
    "Class ids in patches and specks, with background and some classes missing."
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, c, (-(-h//4), -(-w//4)), generator=g)
    patches = coarse.repeat_interleave(4, 0).repeat_interleave(4, 1)[:h, :w]
    specks = torch.rand(h, w, generator=g) < .05
    fine = torch.randint(0, c, (h, w), generator=g)
    labels = torch.where(specks, fine, patches * (torch.rand(h, w, generator=g) < .9))
    return labels * (torch.rand(c, generator=g) < .6)[labels]


def sizes_of(h, w): return [(-(-h//s), -(-w//s)) for s in (16, 8, 4, 2, 1)]
def inside(a, b): return not (a & ~b).any()


def assert_contains(sets, truth, c):
    "`sets` is an interval with `truth` in it, and each of its regions holds its class."
    assert (inside(sets.certain, truth.certain) and inside(truth.certain, sets.possible)
            and inside(sets.certain, sets.possible))
    for k in range(MAX_CLASSES):
        region = (sets.regions >> k & 1).bool()
        if region.any(): assert (truth.certain[region] >> k % c & 1).any(), f'region bit {k} without class {k % c}'


@check(seeds, side, side, few, kinds)
def test_every_kind_contains_the_truth(seed, h, w, c, kind):
    labels = random_labels(seed, h, w, c)
    assert_contains(weaken(Mask(labels.numpy()), kind, c).class_sets((h, w), c), from_labels(labels, c), c)


@check(seeds, side, side, few, kinds)
def test_at_every_level_too(seed, h, w, c, kind):
    labels = random_labels(seed, h, w, c)
    sets = weaken(Mask(labels.numpy()), kind, c).class_sets((h, w), c)
    weak, truth = (pyramid(s, sizes_of(h, w), c) for s in (sets, from_labels(labels, c)))
    for a, b in zip(weak, truth): assert_contains(a, b, c)


@check(seeds, side, side, few)
def test_weaker_kinds_say_less(seed, h, w, c):
    mask = Mask(random_labels(seed, h, w, c).numpy())
    by_kind = {k: weaken(mask, k, c).class_sets((h, w), c) for k in TRUE}
    chains = (('mask', 'extreme points', 'tight boxes', 'boxes', 'image labels', 'unlabelled'),
              ('boxes', 'loose boxes', 'image labels'), ('mask', 'points', 'image labels'),
              ('mask', 'scribbles', 'image labels'))
    for strong, weak in (pair for chain in chains for pair in pairwise(chain)):
        a, b = by_kind[strong], by_kind[weak]
        assert inside(b.certain, a.certain) and inside(a.possible, b.possible), (strong, weak)


@check(seeds, side, side, few)
def test_boxes_are_tight_and_say_what_is_outside(seed, h, w, c):
    labels = random_labels(seed, h, w, c)
    sets = weaken(Mask(labels.numpy()), 'boxes', c).class_sets((h, w), c)
    for k, x0, y0, x1, y1 in boxes_of((1 << labels).numpy(), c):
        part = labels[y0:y1, x0:x1] == k
        assert part[0].any() and part[-1].any() and part[:, 0].any() and part[:, -1].any()
        assert (sets.possible[y0:y1, x0:x1] >> k & 1).all()
    outside = sets.possible == 1
    assert (sets.certain[outside] == 1).all() and not sets.certain[~outside].any() and not labels[outside].any()


def random_bits(seed, h, w, c):
    "Overlapping structures: sets of foreground classes, or background."
    a, b = (random_labels(s, h, w, c) for s in (seed, seed+1))
    sets = (1 << a | 1 << b) & ~1
    return torch.where(sets == 0, 1, sets)


@check(seeds, side, side, few, kinds)
def test_every_kind_contains_the_truth_where_structures_overlap(seed, h, w, c, kind):
    bits = random_bits(seed, h, w, c)
    sets = weaken(Mask(bits.numpy(), bits=True), kind, c).class_sets((h, w), c)
    assert_contains(sets, class_sets(bits), c)


@check(seeds, side, side, few, st.sampled_from(KINDS), st.booleans())
def test_weakening_is_named_and_repeats_itself(seed, h, w, c, kind, bits):
    values = random_bits(seed, h, w, c) if bits else random_labels(seed, h, w, c)
    once, again = (weaken(Mask(values.numpy().copy(), bits), kind, c) for _ in range(2))
    assert once.kind == again.kind == kind
    assert torch.equal(*(a.class_sets((h, w), c).as_subclass(Tensor) for a in (once, again)))


@check(seeds, side, side, few)
def test_each_line_of_a_tight_box_holds_its_class(seed, h, w, c):
    labels = random_labels(seed, h, w, c)
    plain, tight = (weaken(Mask(labels.numpy()), k, c).class_sets((h, w), c) for k in ('boxes', 'tight boxes'))
    assert torch.equal(tight.regions & ~TIGHT, plain.regions)
    assert torch.equal(tight[:2].as_subclass(Tensor), plain[:2].as_subclass(Tensor))
    flag = tight.regions & TIGHT != 0
    for k in range(MAX_CLASSES):
        inside = (tight.regions >> k & 1).bool()
        if not (inside & flag).any() or (inside & ~flag).any(): continue
        there = inside & (labels == k % c)
        assert torch.equal(there.any(0), inside.any(0)) and torch.equal(there.any(1), inside.any(1))


@check(seeds, side, side, few)
def test_sides_move_by_a_fifth(seed, h, w, c):
    mask = Mask(random_labels(seed, h, w, c).numpy())
    exact, loose, jittered = (weaken(mask, k, c).boxes for k in ('boxes', 'loose boxes', 'jittered boxes'))
    for (k, x0, y0, x1, y1), (_, u0, v0, u1, v1), (_, s0, t0, s1, t1) in zip(exact, loose, jittered, strict=True):
        dx, dy = (max(1, round(.2*n)) for n in (x1-x0, y1-y0))
        assert (u0, v0, u1, v1) == (max(x0-dx, 0), max(y0-dy, 0), min(x1+dx, w), min(y1+dy, h))
        assert max(abs(s0-x0), abs(s1-x1)) <= .2*(x1-x0) + .5 and max(abs(t0-y0), abs(t1-y1)) <= .2*(y1-y0) + .5
    Boxes(jittered).class_sets((h, w), c)


@check(seeds, side, side, few)
def test_every_structure_is_marked(seed, h, w, c):
    mask = Mask(random_labels(seed, h, w, c).numpy())
    boxes = weaken(mask, 'boxes', c).boxes
    points, strokes, extremes = (weaken(mask, k, c) for k in ('points', 'scribbles', 'extreme points'))
    assert extremes.boxes.boxes == boxes
    for (k, x0, y0, x1, y1), (kp, x, y), (ks, way) in zip(boxes, points.points, strokes.strokes):
        assert k == kp == ks and all(x0 <= x < x1 and y0 <= y < y1 for x, y in [(x, y), *way])
        assert all(max(abs(a[0]-b[0]), abs(a[1]-b[1])) == 1 for a, b in pairwise(way)), 'a line without gaps'
    background = (mask.read() == 0).any()
    assert len(points.points) == len(strokes.strokes) == len(boxes) + background


@pytest.mark.parametrize('kind', ['points', 'scribbles', 'extreme points'])
def test_marks_survive_another_size(kind):
    labels = torch.zeros(256, 256, dtype=torch.long)
    labels[40:43, 60:200], labels[100:180, 30:70], labels[200, 200] = 1, 2, 3
    weak = weaken(Mask(labels.numpy()), kind, 4)
    small, large = weak.sets_at((256, 256), 4, (64, 64)), weak.class_sets((256, 256), 4)
    certain = large.certain & ~1
    for y, x in certain.nonzero().tolist():
        assert small.certain[y//4, x//4] == certain[y, x], (y, x)
    assert torch.equal(weak.sets_at((256, 256), 4, (256, 256)).as_subclass(Tensor), large.as_subclass(Tensor))
    if kind != 'extreme points': assert len(resize(large, (64, 64)).certain.unique()) < len(small.certain.unique())


@check(seeds, side, side, few, kinds, side, side)
def test_at_any_size_certain_is_possible(seed, h, w, c, kind, h2, w2):
    weak = weaken(Mask(random_labels(seed, h, w, c).numpy()), kind, c)
    sets = weak.sets_at((h, w), c, (h2, w2))
    assert sets.shape == (3, h2, w2) and inside(sets.certain, sets.possible) and sets.possible.ne(0).all()


@pytest.mark.parametrize('exhaustive', [True, False])
def test_what_marks_say_of_the_rest(exhaustive):
    rest = 0b101 if exhaustive else EVERYTHING
    for marks in Points([(2, 1, 1)], exhaustive), Scribbles([(2, [(1, 1), (3, 1)])], exhaustive=exhaustive):
        sets = marks.class_sets((4, 4), 3)
        assert sets[:2, 3, 3].tolist() == [0, rest] and sets[:2, 1, 1].tolist() == [4, 4]


def test_diagonal_neighbours_share_a_box():
    assert boxes_of((1 << torch.eye(3, dtype=torch.long)).numpy(), 2) == [(1, 0, 0, 3, 3)]
    assert len(boxes_of(torch.tensor([[2, 1, 2]]).numpy(), 2)) == 2


@pytest.mark.parametrize('c', [2, 4, 20, 31, 62])
def test_more_boxes_than_region_bits(c):
    "Boxes that share a bit make one larger region, which holds the class all the same."
    labels = torch.zeros(24, 24, dtype=torch.long)
    labels[::3, ::3] = c-1
    boxes = boxes_of((1 << labels).numpy(), c)
    assert len(boxes) == 64 > MAX_CLASSES//c
    sets, truth = Boxes(boxes).class_sets((24, 24), c), from_labels(labels, c)
    assert len(sets.regions.unique()) == MAX_CLASSES//c + 1
    for a, b in zip(pyramid(sets, sizes_of(24, 24), c), pyramid(truth, sizes_of(24, 24), c)): assert_contains(a, b, c)


@check(seeds, side, side, few, st.data())
def test_partial_masks_contain_the_truth(seed, h, w, c, data):
    labels = random_labels(seed, h, w, c)
    seen = data.draw(st.sets(st.integers(1, c-1)))
    drawn = torch.where(torch.isin(labels, torch.tensor([0, *seen])), labels, 0)
    sets = PartialMask(drawn.numpy(), looked_for=tuple(seen)).class_sets((h, w), c)
    sizes, truth = sizes_of(h, w), from_labels(labels, c)
    for a, b in zip(pyramid(sets, sizes, c), pyramid(truth, sizes, c)): assert_contains(a, b, c)
    open_ = sets.possible[drawn == 0] & ((1 << c) - 1)
    expect = encode({0, *range(1, c)} - seen)
    assert (open_ == expect).all(), 'nothing drawn: background, or a class that nobody looked for'
    if len(seen) < c-1: assert torch.equal(sets.known, drawn > 0)


@check(seeds, side, side, few, st.data())
def test_partial_masks_of_overlapping_structures_contain_the_truth(seed, h, w, c, data):
    "A structure that was drawn does not rule out one that nobody looked for."
    bits = random_bits(seed, h, w, c)
    seen = data.draw(st.sets(st.integers(1, c-1)))
    drawn = bits & encode(seen)
    drawn = torch.where(drawn == 0, 1, drawn)
    sets = PartialMask(drawn.numpy(), bits=True, looked_for=tuple(seen)).class_sets((h, w), c)
    truth, unseen = class_sets(bits), encode(set(range(1, c)) - seen)
    assert_contains(sets, truth, c)
    assert inside(torch.full_like(bits, unseen), sets.possible)
    for k in seen: assert torch.equal(sets.possible >> k & 1, bits >> k & 1), 'what was looked for is known'


def test_a_partial_mask_that_leaves_nothing_out_is_a_mask():
    labels = random_labels(0, 8, 8, 3)
    partial, full = PartialMask(labels.numpy(), looked_for=(1, 2)), Mask(labels.numpy())
    assert torch.equal(*(m.class_sets((8, 8), 3).as_subclass(Tensor) for m in (partial, full)))


def random_probs(seed, c, h, w, kind):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, c, h, w, generator=g) * {'mild': 1, 'sure': 30, 'flat': 0}[kind]
    return x.softmax(1)


@check(seeds, st.integers(1, 16), st.integers(1, 16), few, kinds, sharpness, st.floats(0, 1))
def test_pruning_stays_inside(seed, h, w, c, kind, sharp, threshold):
    sets = weaken(Mask(random_labels(seed, h, w, c).numpy()), kind, c).class_sets((h, w), c)[None]
    out = prune_candidates(ClassSets(sets), random_probs(seed, c, h, w, sharp), threshold)
    assert (inside(sets.certain, out.certain) and inside(out.certain, out.possible)
            and inside(out.possible, sets.possible))
    assert out.possible.bool().all() and torch.equal(out.regions, sets.regions)
    assert torch.equal(out.as_subclass(Tensor)[:, :, sets.known[0]], sets.as_subclass(Tensor)[:, :, sets.known[0]])


@check(seeds, few, sharpness, st.floats(0, 1))
def test_pruning_any_interval(seed, c, sharp, threshold):
    "Also where some classes are certain and others open, as for overlapping structures."
    bits = torch.randint(1, 1 << c, (3, 1, 9, 9), generator=torch.Generator().manual_seed(seed))
    sets = class_sets(bits[0] & bits[1], bits[0] | bits[2])
    out = prune_candidates(sets, random_probs(seed, c, 9, 9, sharp), threshold)
    assert (inside(sets.certain, out.certain) and inside(out.certain, out.possible)
            and inside(out.possible, sets.possible))


def shares(seed, sets, c):
    "A network's probabilities, and the largest share of a possible class at each pixel."
    p = random_probs(seed, c, *sets.shape[-2:], 'mild')
    share = p * unpack(sets.possible, c)
    return p, (share / share.sum(1, keepdim=True)).amax(1)


@check(seeds, few, st.floats(.5, .99))
def test_what_the_network_is_sure_of_is_decided(seed, c, threshold):
    sets = weaken(Mask(random_labels(seed, 9, 9, c).numpy()), 'image labels', c).class_sets((9, 9), c)[None]
    p, top = shares(seed, sets, c)
    out = prune_candidates(sets, p, threshold)
    assert out.known[top > threshold + 1e-4].all()
    best = (p * unpack(sets.possible, c)).argmax(1)
    assert (out.possible >> best & 1).all(), 'the most likely class stays possible'


@check(seeds, few, st.floats(.5, .99))
def test_what_the_network_is_not_sure_of_stays_open(seed, c, threshold):
    "With many classes too: no class becomes certain because it is the least improbable of twenty."
    sets = weaken(Mask(random_labels(seed, 9, 9, c).numpy()), 'unlabelled', c).class_sets((9, 9), c)[None]
    p, top = shares(seed, sets, c)
    assert not prune_candidates(sets, p, threshold).known[top < threshold - 1e-4].any()


@check(seeds, few, st.floats(0, .99), st.floats(0, .99))
def test_a_higher_threshold_leaves_more_open(seed, c, a, b):
    sets = weaken(Mask(random_labels(seed, 9, 9, c).numpy()), 'unlabelled', c).class_sets((9, 9), c)[None]
    low, high = (prune_candidates(sets, random_probs(seed, c, 9, 9, 'mild'), t) for t in sorted((a, b)))
    assert inside(low.possible, high.possible) and inside(high.certain, low.certain)


def test_no_probability_left_for_what_is_possible():
    "The network rules out all that the annotation allows: the annotation wins, nothing is decided."
    sets = ImageLabels([1]).class_sets((2, 2), 3)[None]
    probs = torch.zeros(1, 3, 2, 2)
    probs[:, 2] = 1
    assert torch.equal(prune_candidates(ClassSets(sets), probs).as_subclass(Tensor), sets.as_subclass(Tensor))


def test_a_mask_of_class_sets_keeps_every_class():
    bits = torch.tensor([[0b110, 0b001], [0b010, 0b100]])
    sets = Mask(bits.numpy(), bits=True).class_sets((2, 2), 3)
    assert torch.equal(sets.as_subclass(Tensor), class_sets(bits).as_subclass(Tensor))


def test_the_highest_set_is_one():
    assert Mask(torch.tensor([[1, 0b111]]).numpy(), bits=True).class_sets((1, 2), 3).certain.tolist() == [[1, 7]]


@pytest.mark.parametrize("bits", [0b1000, 0, -1])
def test_a_mask_of_class_sets_with_unknown_classes(bits):
    with pytest.raises(ValueError, match='class'):
        Mask(torch.tensor([[1, bits]]).numpy(), bits=True).class_sets((1, 2), 3)


@pytest.mark.parametrize('make', [
    lambda: Boxes([(1, 0, 0, 9, 9)]), lambda: Boxes([(3, 0, 0, 2, 2)]), lambda: Boxes([(1, 2, 0, 1, 2)]),
    lambda: Boxes([(1, 0, 0, float('nan'), 2)]), lambda: Boxes([(0, 0, 0, 2, 2)]), lambda: Boxes([(1, -1, 0, 2, 2)]),
    lambda: ImageLabels([0]), lambda: ImageLabels([3]), lambda: Mask(torch.zeros(3, 4).long().numpy()),
    lambda: Points([(3, 0, 0)]), lambda: Points([(1, 4, 0)]), lambda: Points([(1, 0, -1)]),
    lambda: Points([(1, .2, .3)]), lambda: Points([(1, float('inf'), 2)]), lambda: Scribbles([(1, [])]),
    lambda: Scribbles([(1, [(0, 0), (5, 0)])]), lambda: ExtremePoints([(1, [(0, 0)]*3)]),
    lambda: ExtremePoints([(0, [(0, 0)]*4)]), lambda: ExtremePoints([(1, [(0, 0), (2, 2), (1, 1), (9, 1)])])])
def test_contradictions_are_refused(make):
    with pytest.raises(ValueError, match='box|image labels|mask is|mark|extreme points'):
        make().class_sets((4, 4), 3)


@pytest.mark.parametrize('box', [(1, 2, 0, 2, 2), (1, 0, 2, 2, 2), (1, 2.5, 0, 2.5, 2)])
def test_a_box_of_no_width_or_height(box):
    with pytest.raises(ValueError, match='empty or inverted'): _check_box(box, (4, 4), 3)


@check(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_shares_are_no_pixels(x0, y0, x1, y1):
    "Every box in 0..1 is refused, but for the pixel in the corner."
    if (x0, y0, x1, y1) == (0, 0, 1, 1): return
    with pytest.raises(ValueError, match='multiply x by|empty or inverted'): _check_box((1, x0, y0, x1, y1), (4, 4), 3)


def test_the_smallest_boxes():
    assert _check_box((1, 0, 0, 1, 1), (4, 4), 3) == (1, 0, 0, 1, 1)
    assert _check_box((1, .2, .4, 1.5, 1), (4, 4), 3) == (1, 0, 0, 2, 1)


# What people's files hold, each derived from a mask by somebody who tells the truth: class sets -> annotation.

def uniform(g, *shape): return torch.rand(*shape, generator=g)
def some_classes(g, c): return [k for k in range(1, c) if uniform(g, 1) < .5]
def drawn_files(sets, classes): return {k: ((sets >> k & 1)*255).to(torch.uint8).numpy() for k in classes}
def ids_of(sets): return sets.double().log2().long()
def occurring(sets, c): return [k for k in range(1, c) if (sets >> k & 1).any()]


def pixels_with(g, sets, c, n, present):
    "Rows of class, x, y for random pixels at which the class is present, or at which it is not."
    rows = [(k, *pixel.tolist()) for k in range(c) for pixel in ((sets >> k & 1) == present).nonzero().flip(1)]
    return [rows[i] for i in torch.randperm(len(rows), generator=g)[:n]]


def with_gaps(sets, c, bits, g):
    values = torch.where(uniform(g, *sets.shape) < .3, 255, sets if bits else ids_of(sets))
    return Mask(values.numpy(), bits, unknown=255)


def in_other_numbers(sets, c, bits, g):
    if bits: return Mask((sets & ~1).numpy() << 1, True, values={2 << k: k for k in range(1, c)})
    values = {int(v): k for k, v in enumerate(torch.randperm(256, generator=g)[:c])}
    table = torch.tensor(list(values))
    return Mask(table[ids_of(sets)].numpy(), values=values)


def in_colours(sets, c, bits, g):
    colours = torch.stack([torch.arange(c)*11, uniform(g, c)*255, uniform(g, c)*255], 1).to(torch.uint8)
    pixels = colours[ids_of(sets & -sets if bits else sets)]
    if bits: return in_other_numbers(sets, c, bits, g)
    return Mask(pixels.numpy(), values={tuple(v.tolist()): k for k, v in enumerate(colours)})


def by_class(sets, c, bits, g): return ClassMasks(drawn_files(sets, occurring(sets, c)), bits=bits)


def by_some_classes(sets, c, bits, g):
    seen = some_classes(g, c)
    return ClassMasks(drawn_files(sets, seen), looked_for=seen, bits=bits)


def partly(sets, c, bits, g):
    return weaken(Mask((sets if bits else ids_of(sets)).numpy(), bits), 'partial mask', c, some_classes(g, c))


def partly_with_gaps(sets, c, bits, g):
    full, drawn = partly(sets, c, bits, g), with_gaps(sets, c, bits, g)
    values = torch.where(drawn.read() < 0, 255, torch.from_numpy(full.labels))
    return PartialMask(values.numpy(), bits, full.looked_for, unknown=255)


def report(sets, c, bits, g):
    there = occurring(sets, c)
    said = some_classes(g, c)
    return ImageLabels([k for k in there if k in said], absent=[k for k in said if k not in there])


def some_tight(sets, c, bits, g):
    boxes = boxes_of(sets.numpy(), c)
    return Boxes(boxes, tight=(uniform(g, len(boxes)) < .5).tolist())


def clicks(sets, c, bits, g):
    yes, no = (pixels_with(g, sets, c, 8, present) for present in (1, 0))
    return Points(yes, exhaustive=False, bits=bits, absent=no)


def strokes(sets, c, bits, g):
    one = ids_of(sets & -sets) # one of the classes of a pixel
    values = torch.where(uniform(g, *sets.shape) < .2, one, 255)
    values[0, 0] = one[0, 0]
    return ScribbleImage(values.numpy(), exhaustive=False, bits=bits)


def core_and_rim(sets, c, bits, g):
    subset = sets & torch.randint(0, 1 << c, sets.shape, generator=g)
    superset = sets | torch.randint(0, 1 << c, sets.shape, generator=g)
    return Interval(subset.numpy(), superset.numpy(), bits=bits)


def soft_maps(sets, c, bits, g):
    "Of a model that keeps what it calls certain, and what it calls impossible."
    core, rim = ({k: v for k, v in enumerate(row, 1)} for row in (uniform(g, c-1)*.5 + .5, uniform(g, c-1)*.5))
    core, rim = ({k: float(v) for k, v in cuts.items()} for cuts in (core, rim))
    maps = {}
    for k in range(1, c):
        there, p = (sets >> k & 1).bool(), uniform(g, *sets.shape).double()
        maps[k] = torch.where(there, rim[k] + p*(1-rim[k]), p*core[k]*.999).numpy()
    seen = some_classes(g, c)
    return ProbabilityMaps({k: maps[k] for k in seen}, core, rim, bits=bits)


HONEST = {'mask with unknown pixels': (with_gaps, 'mask'), 'mask in other numbers': (in_other_numbers, 'mask'),
          'mask in colours': (in_colours, 'mask'), 'a file for each class': (by_class, 'mask'),
          'a file for some classes': (by_some_classes, 'partial mask'), 'partial mask': (partly, 'partial mask'),
          'partial mask with unknown pixels': (partly_with_gaps, 'partial mask'), 'report': (report, 'image labels'),
          'boxes, some tight': (some_tight, 'boxes'), 'points, some denied': (clicks, 'points'),
          'image of strokes': (strokes, 'scribbles'), 'interval': (core_and_rim, 'interval'),
          'probability maps': (soft_maps, 'probability maps')}
MARKS = 'points, some denied', 'image of strokes' # kept in a smaller image, where the pixel may show another class
honest = st.sampled_from(list(HONEST))


def truth_and_annotation(seed, h, w, c, bits, name):
    sets = random_bits(seed, h, w, c) if bits else 1 << random_labels(seed, h, w, c)
    return class_sets(sets), HONEST[name][0](sets, c, bits, torch.Generator().manual_seed(seed))


files_of_sets = st.integers(2, 8) # classes, so that sets with a code of their own for unknown fit a byte


@check(seeds, side, side, files_of_sets, st.booleans(), honest, n=150)
def test_honest_files_contain_the_truth(seed, h, w, c, bits, name):
    truth, said = truth_and_annotation(seed, h, w, c, bits, name)
    sets = said.class_sets((h, w), c)
    assert_contains(sets, truth, c)
    assert sets.shape == (3, h, w) and (sets.possible & (1 << c)-1).all()
    for a, b in zip(pyramid(sets, sizes_of(h, w), c), pyramid(truth, sizes_of(h, w), c)): assert_contains(a, b, c)


@check(seeds, side, side, files_of_sets, st.booleans(), honest, side, side, n=150)
def test_honest_files_at_another_size(seed, h, w, c, bits, name, h2, w2):
    truth, said = truth_and_annotation(seed, h, w, c, bits, name)
    sets, small = said.sets_at((h, w), c, (h2, w2)), resize(truth, (h2, w2))
    assert sets.shape == (3, h2, w2) and inside(sets.certain, sets.possible) and (sets.possible & (1 << c)-1).all()
    if name in MARKS: return
    assert inside(sets.certain, small.certain) and inside(small.certain, sets.possible)


@check(seeds, side, side, files_of_sets, st.booleans(), honest)
def test_what_says_nowhere_is_nowhere_certain(seed, h, w, c, bits, name):
    _, said = truth_and_annotation(seed, h, w, c, bits, name)
    assert said.kind in (HONEST[name][1], 'tight boxes' if name == 'boxes, some tight' else None)
    few = c == 2 or name == 'report' # where all classes but one are denied, the last follows
    if not said.says_where and not few: assert not said.class_sets((h, w), c).certain.any(), name


@check(seeds, st.integers(2, 33), st.integers(2, 33), files_of_sets, st.booleans(), st.sampled_from(MARKS), side, side)
def test_no_mark_is_lost_in_another_size(seed, h, w, c, bits, name, h2, w2):
    truth, said = truth_and_annotation(seed, h, w, c, bits, name)
    if name == 'points, some denied': said.absent = ()
    large, sets = said.class_sets((h, w), c), said.sets_at((h, w), c, (h2, w2))
    for y, x in large.certain.nonzero().tolist():
        row, column = int((y + .5)*h2/h), int((x + .5)*w2/w)
        assert inside(large.certain[y, x], sets.possible[row, column])


@check(seeds, files_of_sets, st.booleans())
def test_a_denied_class_is_denied_at_its_pixel_alone(seed, c, bits):
    sets = random_bits(seed, 9, 9, c) if bits else 1 << random_labels(seed, 9, 9, c)
    g = torch.Generator().manual_seed(seed)
    yes, no = (pixels_with(g, sets, c, 5, present) for present in (1, 0))
    before, after = (Points(yes, exhaustive=False, bits=bits, absent=rows).class_sets((9, 9), c) for rows in ((), no))
    changed = ((before.possible ^ after.possible) & (1 << c)-1).nonzero().tolist()
    assert all(not after.possible[y, x] >> k & 1 for k, x, y in no)
    assert {(y, x) for y, x in changed} <= {(y, x) for _, x, y in no}


@check(seeds, side, side, files_of_sets, st.booleans())
def test_looking_for_more_says_more(seed, h, w, c, bits):
    sets = random_bits(seed, h, w, c) if bits else 1 << random_labels(seed, h, w, c)
    seen = some_classes(torch.Generator().manual_seed(seed), c)
    few, all_ = (ClassMasks(drawn_files(sets, k), looked_for=k, bits=bits).class_sets((h, w), c)
                 for k in (seen, list(range(1, c))))
    assert inside(few.certain, all_.certain) and inside(all_.possible, few.possible)
    assert torch.equal(all_.as_subclass(Tensor), class_sets(sets).as_subclass(Tensor))


@check(seeds, side, side, st.integers(2, 6))
def test_three_partial_masks_make_a_whole(seed, h, w, c):
    "What one folder looked for and another did not leaves no pixel open between them."
    mask = Mask(random_labels(seed, h, w, c).numpy())
    parts = [weaken(mask, 'partial mask', c, [k]).class_sets((h, w), c) for k in range(1, c)]
    possible = torch.full((h, w), (1 << c) - 1)
    for part in parts: possible &= part.possible
    assert torch.equal(possible, mask.read_sets())


@check(seeds, files_of_sets, st.booleans(), st.floats(0, 1), st.floats(0, 1))
def test_a_wider_rim_and_a_smaller_core_say_less(seed, c, bits, a, b):
    "Where several classes have no core in common."
    g, (low, high) = torch.Generator().manual_seed(seed), sorted((a, b))
    maps = {1: uniform(g, 9, 9).numpy()}
    wide, narrow = (ProbabilityMaps(maps, {1: core}, {1: rim}, bits=bits).class_sets((9, 9), 2)
                    for core, rim in ((2, low), (high, high)))
    assert inside(wide.certain, narrow.certain) and inside(narrow.possible, wide.possible)
    assert narrow.known.all()


def simulated(g, n, h=24, noise=.7):
    "Blurred squares in noise, of which every fourth image has none: maps and masks."
    maps, masks = [], []
    for i in range(n):
        y, x = np.ogrid[:h, :h]
        (cy, cx), r = g.uniform(6, 18, 2), g.uniform(2, 6) * (i % 4 > 0)
        there = np.maximum(abs(y-cy), abs(x-cx)) < r
        logit = 6*gaussian_filter(there.astype(float), 1) - 3 + noise*g.normal()*2 + noise*g.normal(size=(h, h))
        maps.append({1: 1/(1 + np.exp(-logit))})
        masks.append(Mask(there.astype(int)))
    return maps, masks


def held_shares(maps, masks, core, rim):
    "Mean share of the core that is right where there is a core or the class, and of the class in the rim."
    right, kept = [], []
    for one, mask in zip(maps, masks):
        p, there = one[1], mask.labels == 1
        if there.any(): kept.append((p[there] >= rim).mean())
        if (p >= core).any(): right.append(there[p >= core].mean())
        elif there.any(): right.append(1)
    return np.mean(right), np.mean(kept)


@check(seeds, st.integers(30, 60), st.sampled_from([.7, .8, .9, .95]), n=25)
def test_thresholds_hold_on_the_masks_at_hand(seed, n, share):
    maps, masks = simulated(np.random.default_rng(seed), n)
    found = fit_thresholds(maps, masks, 2, share).loc[1]
    assert 0 <= found.rim <= found.core
    assert found.masks == sum((m.labels == 1).any() for m in masks)
    assert found.pixels == sum((m.labels == 1).sum() for m in masks)
    assert min(held_shares(maps, masks, found.core, found.rim)) >= share


@pytest.mark.parametrize('share', [.8, .9])
@pytest.mark.parametrize('noise', [.3, .7, 1.5])
def test_thresholds_hold_on_other_images(share, noise):
    "In expectation over the masks at hand and the next image: the mean of 40 draws of both."
    g, held = np.random.default_rng(0), []
    for _ in range(40):
        found = fit_thresholds(*simulated(g, 24, noise=noise), 2, share).loc[1]
        held.append(held_shares(*simulated(g, 24, noise=noise), found.core, found.rim))
    mean, error = np.mean(held, 0), np.std(held, 0)/len(held)**.5
    assert (mean > share - 2*error).all(), mean


@check(seeds, n=15)
def test_a_larger_share_leaves_more_open(seed):
    maps, masks = simulated(np.random.default_rng(seed), 40)
    low, high = (fit_thresholds(maps, masks, 2, share).loc[1] for share in (.8, .95))
    if low.rim < low.core: assert high.rim <= low.rim and high.core >= low.core
    assert high.core - high.rim >= low.core - low.rim


def test_unknown_pixels_do_not_count_for_thresholds():
    maps, masks = simulated(np.random.default_rng(0), 30)
    half = [Mask(np.where(np.arange(24) < 12, m.labels, 255), unknown=255) for m in masks]
    left = [Mask(m.labels[:, :12]) for m in masks]
    cut = [{1: one[1][:, :12]} for one in maps]
    assert fit_thresholds(maps, half, 2, .7).equals(fit_thresholds(cut, left, 2, .7))


@pytest.mark.parametrize('make, words', [
    (lambda: Mask(np.array([[0, 7]]), values={0: 0}), 'mask holds 7 at 1 pixels'),
    (lambda: Mask(np.zeros((1, 2, 3), np.uint8), values={(255, 0, 0): 1}), r'holds \(0, 0, 0\) at 2 pixels'),
    (lambda: Mask(np.array([[[0, 0, 0], [255, 0, 0]]], np.uint8), values={0: 0, 255: 1}), 'is in colour'),
    (lambda: Mask(np.array([[0, 255]])), 'values={0: 0, 255: 1}'),
    (lambda: PartialMask(np.array([[0, 1]]), looked_for=[5]), 'foreground classes are 1..1'),
    (lambda: ClassMasks({3: np.array([[0, 1]])}), 'foreground classes are 1..1'),
    (lambda: ClassMasks({1: np.array([[3, 255]])}), 'has no soft edges'),
    (lambda: ClassMasks({1: np.array([[1]])}), 'must agree'),
    (lambda: ImageLabels([], absent=[2]), 'absent image labels'),
    (lambda: Points([], absent=[(0, 0, 0), (1, 0, 0)]), 'no class is left there'),
    (lambda: Boxes([(1, 0, 0, 1, 1)], tight=[True, False]), '2 values for 1 boxes'),
    (lambda: ScribbleImage(np.array([[255, 255]])), 'nobody drew'),
    (lambda: Interval(np.array([[0, 1]]), np.array([[0, 1]])), 'no class is possible at 1 pixels, first at x=0, y=0'),
    (lambda: ProbabilityMaps({1: np.array([[.2, np.nan]])}, {1: .9}, {1: .1}), 'probabilities are')])
def test_files_that_cannot_be_meant(make, words):
    with pytest.raises(ValueError, match=words): make().class_sets((1, 2), 2)


@pytest.mark.parametrize('suffix', ['.png', '.gif', '.tif', '.bmp'])
def test_black_and_white_files(tmp_path, suffix):
    drawn = np.zeros((6, 9), np.uint8)
    drawn[2:4, 3:7] = 255
    for mode in ('L', '1', 'RGB', 'P'):
        path = tmp_path/f'{mode}{suffix}'
        Image.fromarray(drawn).convert(mode).save(path)
        assert (ClassMasks({1: path}).read_sets().numpy() == np.where(drawn, 2, 1)).all(), path
