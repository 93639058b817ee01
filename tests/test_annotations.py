("Whatever kind of annotation a mask is weakened to, at every level: certain classes are in the mask, "
 "the mask's classes are possible.")
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from mlds.annotations import (KINDS, Boxes, ExtremePoints, ImageLabels, Mask, PartialMask, Points, Scribbles,
                              _check_box, boxes_of, weaken)
from mlds.classsets import (EVERYTHING, MAX_CLASSES, TIGHT, ClassSets, class_sets, encode, from_labels, pyramid, resize,
                            unpack)
from mlds.pseudolabels import prune_candidates

check = lambda *strategies, n=40: lambda f: settings(max_examples=n, deadline=None)(given(*strategies)(f))
torch.set_num_threads(1)
seeds, side, few = st.integers(0, 2**31), st.integers(1, 33), st.integers(2, 20)
FALSE = 'jittered boxes', 'boxes as masks' # annotators' errors, and users'
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
    sets = PartialMask(drawn.numpy(), annotated=tuple(seen)).class_sets((h, w), c)
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
    sets = PartialMask(drawn.numpy(), bits=True, annotated=tuple(seen)).class_sets((h, w), c)
    truth, unseen = class_sets(bits), encode(set(range(1, c)) - seen)
    assert_contains(sets, truth, c)
    assert inside(torch.full_like(bits, unseen), sets.possible)
    for k in seen: assert torch.equal(sets.possible >> k & 1, bits >> k & 1), 'what was looked for is known'


def test_a_partial_mask_that_leaves_nothing_out_is_a_mask():
    labels = random_labels(0, 8, 8, 3)
    partial, full = PartialMask(labels.numpy(), annotated=(1, 2)), Mask(labels.numpy())
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
