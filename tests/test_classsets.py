"Properties of `mlds.classsets`, against one-hot channels and plain loops over cells."
import pytest
import torch
import torch.nn.functional as F
from fastai.torch_core import TensorImage
from fastai.vision.augment import PadMode
from hypothesis import given, settings, strategies as st
from torch import Tensor

from mlds.classsets import (EVERYTHING, MAX_CLASSES, TIGHT, ClassSets, cell_pool, cell_side, class_sets,
                            in_single_cell, decode, encode, from_labels, nothing_known, or_pool, pack, pyramid,
                            region_classes, resize, to_labels, unpack)

check = lambda *strategies, n=60: lambda f: settings(max_examples=n, deadline=None)(given(*strategies)(f))
torch.set_num_threads(1)
seeds, side, few = st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 20)
strides = (1, 2, 4, 8, 16)
full = lambda c: (1 << c) - 1


def random_sets(seed, h, w, c, batch=()):
    "Any valid class sets, with region bits anywhere, of `c` classes."
    g = torch.Generator().manual_seed(seed)
    bits = lambda high: torch.randint(0, high, (*batch, h, w), generator=g)
    certain, scarce = bits(1 << c) & bits(1 << c), MAX_CLASSES//c*c
    possible = certain | bits(1 << c) & bits(1 << c)
    return class_sets(certain, possible, bits(1 << scarce) & bits(1 << scarce) & bits(1 << scarce))


def bits_or(x):
    out = 0
    for b in x.flatten().tolist(): out |= b
    return out


@check(st.sets(st.integers(0, MAX_CLASSES-1)), st.integers(1, MAX_CLASSES))
def test_encode_and_decode(classes, n):
    assert decode(encode(classes), MAX_CLASSES) == sorted(classes)
    assert decode(encode(classes), n) == sorted(c for c in classes if c < n)
    assert encode(classes) >= 0


@pytest.mark.parametrize('c', [-1, MAX_CLASSES, 255])
def test_ids_that_do_not_fit(c):
    with pytest.raises(ValueError, match=f'class id {c} does not fit'): encode([c])


@check(seeds, side, side, st.integers(1, MAX_CLASSES))
def test_pack_and_unpack(seed, h, w, c):
    channels = torch.rand(2, c, h, w, generator=torch.Generator().manual_seed(seed)) > .5
    bits = pack(channels)
    assert torch.equal(unpack(bits, c), channels)
    assert torch.equal(pack(unpack(bits, c)), bits)
    assert bits[0, 0, 0] == encode(channels[0, :, 0, 0].nonzero().flatten().tolist())


@check(seeds, side, side, st.integers(1, MAX_CLASSES))
def test_labels_survive(seed, h, w, c):
    labels = torch.randint(0, c, (h, w), generator=torch.Generator().manual_seed(seed))
    sets = from_labels(labels, c)
    assert torch.equal(to_labels(sets.certain), labels) and sets.known.all() and not sets.regions.any()
    assert (to_labels(torch.zeros(2, 2, dtype=torch.long)) == -1).all()


@pytest.mark.parametrize('low,high', [(-1, 3), (0, 4), (0, 255)])
def test_class_ids_outside_the_list(low, high):
    with pytest.raises(ValueError, match=rf'class ids {low}\.\.{high} found, but 4 classes'):
        from_labels(torch.tensor([[low, high]]), 4)


def test_more_classes_than_a_set_holds():
    "0/255 masks without a list of classes make 256 classes: 1 << 255 must not pass for a class."
    with pytest.raises(ValueError, match='62'): from_labels(torch.tensor([[0, 255]]), 256)


@check(seeds, side, side, few, st.data())
def test_or_pool_is_max_pooling_of_every_class(seed, h, w, c, data):
    size = data.draw(st.integers(1, h)), data.draw(st.integers(1, w))
    bits = random_sets(seed, h, w, c, (2,)).certain
    assert torch.equal(unpack(or_pool(bits, size), c), F.adaptive_max_pool2d(unpack(bits, c).float(), size).bool())


@check(seeds, side, side)
def test_or_pool_keeps_every_bit(seed, h, w):
    bits = random_sets(seed, h, w, 3).regions
    assert or_pool(bits, (1, 1)).item() == bits_or(bits)
    assert torch.equal(or_pool(bits, (h, w)), bits)


@pytest.mark.parametrize('size', [(0, 1), (1, 0), (5, 4), (4, 6)])
def test_or_pool_to_an_impossible_size(size):
    with pytest.raises(ValueError, match='cannot pool'): or_pool(torch.ones(4, 5, dtype=torch.long), size)


@check(seeds, side, side, st.integers(1, 12))
def test_bits_in_a_single_cell(seed, h, w, bits):
    x = torch.randint(0, 1 << bits, (2, h, w), generator=torch.Generator().manual_seed(seed))
    for _ in range(5): x = x & torch.randint(0, 1 << bits, x.shape, generator=torch.Generator().manual_seed(seed+_+1))
    sizes = [(-(-h//s), -(-w//s)) for s in strides]
    for size, found in zip(sizes, in_single_cell(x, sizes)):
        cells = cell_pool(x, size)
        assert found.tolist() == [encode(k for k in range(bits) if (one >> k & 1).sum() == 1) for one in cells]


@check(st.integers(1, 62), st.data())
def test_region_classes(c, data):
    bits = data.draw(st.sets(st.integers(0, MAX_CLASSES//c*c-1)))
    assert region_classes(torch.tensor([encode(bits)]), c).item() == encode({b % c for b in bits})


def cells_by_hand(sets, s, c):
    "Certain, possible and regions of the cells [i*s, (i+1)*s), by loops."
    H, W = sets.shape[-2:]
    rows, cols = range(-(-H//s)), range(-(-W//s))
    plane = lambda p: [[bits_or(p[i*s:(i+1)*s, j*s:(j+1)*s]) for j in cols] for i in rows]
    certain, possible, regions = (torch.tensor(plane(p)) for p in (sets.certain, sets.possible, sets.regions))
    for b in range(MAX_CLASSES):
        where = (regions >> b & 1).nonzero()
        if len(where) == 1: certain[tuple(where[0])] |= 1 << b % c
    return torch.stack([certain, possible | certain, regions])


@check(seeds, side, side, few, st.integers(0, 4), n=30)
def test_pyramid_is_that_of_cells(seed, h, w, c, depth):
    "For the levels of a network: all strides from 1 to 2**depth, whether the image divides or not."
    sets = random_sets(seed, h, w, c)
    wanted = strides[:depth+1][::-1]
    levels = pyramid(sets, [(-(-h//s), -(-w//s)) for s in wanted], c)
    for s, level in zip(wanted, levels): assert torch.equal(level.as_subclass(Tensor), cells_by_hand(sets, s, c)), s


@check(st.sampled_from(strides), st.integers(1, 3), st.integers(1, 3), seeds)
def test_one_level_alone_where_the_size_divides(s, h, w, seed):
    sets = random_sets(seed, h*s, w*s, 4)
    assert torch.equal(pyramid(sets, [(h, w)], 4)[0].as_subclass(Tensor), cells_by_hand(sets, s, 4))


@pytest.mark.parametrize('h,w,s', [(37, 50, 16), (5, 40, 4), (39, 33, 16)])
def test_one_level_alone_where_the_size_does_not_divide(h, w, s):
    "A coarse level must not depend on which other levels were asked for."
    sets = random_sets(0, h, w, 4)
    alone = pyramid(sets, [(-(-h//s), -(-w//s))], 4)[0]
    assert torch.equal(alone.as_subclass(Tensor), cells_by_hand(sets, s, 4))


@check(st.integers(1, 300), st.integers(0, 8))
def test_cells_of_a_network_that_rounds_up(n, depth):
    side = 1 << depth
    m = -(-n//side)
    assert -(-n//cell_side(n, m)) == m and cell_side(n, m) <= side


@pytest.mark.parametrize('n,m', [(104, 6), (50, 3), (7, 3), (64, 5), (4, 8)])
def test_cells_of_a_network_that_rounds_down_are_refused(n, m):
    with pytest.raises(ValueError, match=f'{m} cells do not cover {n} pixels'): cell_side(n, m)
    with pytest.raises(ValueError, match=f'{m} cells'): pyramid(random_sets(0, n, n, 3), [(m, m)], 3)


@check(seeds, side, side, st.integers(1, MAX_CLASSES), n=30)
def test_the_flag_of_tight_boxes_goes_along_and_changes_nothing_else(seed, h, w, c):
    sets = random_sets(seed, h, w, c, (2,))
    on = torch.rand(2, h, w, generator=torch.Generator().manual_seed(seed)) < .2
    flagged = class_sets(sets.certain, sets.possible, sets.regions | torch.where(on, TIGHT, 0))
    sizes, mirror = [(-(-h//s), -(-w//s)) for s in strides], torch.tensor([[-1., 0, 0], [0, 1, 0]]).expand(2, -1, -1)
    plain, other = ([*pyramid(x, sizes, c), resize(x, (5, 7)), x.affine_coord(mirror)] for x in (sets, flagged))
    flags = [cell_pool(on.long(), size).bool() for size in sizes]
    for a, b in zip(plain, other):
        assert torch.equal(b[:, :2].as_subclass(Tensor), a[:, :2].as_subclass(Tensor))
        assert torch.equal(b.regions & ~TIGHT, a.regions)
    for b, expect in zip(other, [*flags, None, on.flip(-1)]):
        if expect is not None: assert torch.equal(b.regions & TIGHT != 0, expect)
    assert not (region_classes(flagged.regions, c) & ~full(c)).any()


def test_pyramid_of_a_batch_is_that_of_its_images():
    sets, sizes = random_sets(3, 21, 34, 5, (4,)), [(2, 3), (3, 5), (6, 9), (11, 17), (21, 34)]
    for i, one in enumerate(sets):
        for a, b in zip(pyramid(one, sizes, 5), pyramid(sets, sizes, 5)): assert torch.equal(a, b[i])


def columns(sets): return set(map(tuple, sets.as_subclass(Tensor).movedim(-3, -1).reshape(-1, 3).tolist()))


@check(seeds, st.integers(2, 30), st.integers(2, 30), st.floats(-90, 90), st.floats(.5, 2), st.floats(-.5, .5),
       st.booleans())
def test_moving_invents_nothing(seed, h, w, degrees, zoom, shift, mirror):
    "Every set that comes out is one that went in, or nothing known."
    sets, a = random_sets(seed, h, w, 4, (2,)), torch.tensor(degrees).deg2rad()
    x = torch.stack([a.cos()*(-1 if mirror else 1), -a.sin(), torch.tensor(shift)])
    y = torch.stack([a.sin(), a.cos(), torch.tensor(-shift)])
    mat = torch.stack([x, y])
    moved = sets.affine_coord((mat*zoom).expand(2, -1, -1))
    assert type(moved) is ClassSets and moved.shape == sets.shape
    for before, after in zip(sets, moved): assert columns(after) <= columns(before) | {(0, EVERYTHING, 0)}


@check(seeds, st.integers(1, 40), st.integers(1, 40), st.sampled_from([(-1, 1), (1, -1), (-1, -1), (1, 1)]))
def test_mirrors_are_exact(seed, h, w, signs):
    sets = random_sets(seed, h, w, 4, (2,))
    mat = torch.tensor([[signs[0], 0., 0.], [0., signs[1], 0.]]).expand(2, -1, -1)
    axes = [a for a, s in zip((-1, -2), signs) if s < 0]
    assert torch.equal(sets.affine_coord(mat), sets.flip(axes) if axes else sets)


@check(seeds, st.integers(4, 30), st.integers(4, 30), st.floats(-30, 30))
def test_sets_move_as_the_image_does(seed, h, w, degrees):
    "An image that shows pixel numbers, moved by fastai to the nearest pixel, names the sets that should have come."
    sets, a = random_sets(seed, h, w, 3, (1,)), torch.tensor(degrees).deg2rad()
    mat = torch.stack([torch.stack([a.cos(), -a.sin(), a*0]), torch.stack([a.sin(), a.cos(), a*0])])[None]
    numbers = TensorImage(torch.arange(1., h*w+1).view(1, 1, h, w))
    shown = numbers.affine_coord(mat, mode='nearest', pad_mode=PadMode.Zeros)
    moved = sets.affine_coord(mat, mode='bilinear', pad_mode=PadMode.Reflection)
    table = torch.cat([torch.tensor([[0], [EVERYTHING], [0]]), sets[0].flatten(-2).as_subclass(Tensor)], -1)
    assert torch.equal(moved[0].as_subclass(Tensor), table[:, shown.long().flatten().as_subclass(Tensor)].view(3, h, w))


def test_every_region_bit_survives_a_move():
    certain, possible = torch.zeros(1, 3, 5, dtype=torch.long), torch.full((1, 3, 5), EVERYTHING)
    sets = class_sets(certain, possible, torch.full((1, 3, 5), (1 << MAX_CLASSES) - 1))
    assert torch.equal(sets.affine_coord(torch.tensor([[[-1., 0, 0], [0, 1, 0]]])), sets)


@check(seeds, side, side, side, side)
def test_resize_takes_the_pixel_under_each_centre(seed, h, w, h2, w2):
    sets = random_sets(seed, h, w, 4)
    small = resize(sets, (h2, w2))
    assert small.shape == (3, h2, w2) and columns(small) <= columns(sets)
    i, j = h2//2, w2//2
    assert torch.equal(small[:, i, j], sets[:, (2*i+1)*h//(2*h2), (2*j+1)*w//(2*w2)])


def test_certain_must_be_possible():
    with pytest.raises(ValueError, match='certain at a pixel where it is not possible'):
        class_sets(torch.tensor([[3]]), torch.tensor([[1]]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_the_same_on_the_gpu():
    sets, sizes = random_sets(1, 53, 70, 5, (2,)), [(-(-53//s), -(-70//s)) for s in strides]
    mat = torch.tensor([[.9, -.2, .1], [.2, .9, 0]]).expand(2, -1, -1)
    same = lambda a, b: torch.equal(a.as_subclass(Tensor), b.as_subclass(Tensor).cpu()) and b.is_cuda
    assert same(sets.affine_coord(mat), sets.cuda().affine_coord(mat.cuda()))
    assert same(resize(sets, (20, 31)), resize(sets.cuda(), (20, 31)))
    assert same(cell_pool(sets, (4, 5)), cell_pool(sets.cuda(), (4, 5)))
    for a, b in zip(pyramid(sets, sizes, 5), pyramid(sets.cuda(), sizes, 5)): assert same(a, b)


def test_a_set_holds_62_classes_and_no_more():
    labels = torch.tensor([[0, MAX_CLASSES-1]])
    assert torch.equal(to_labels(from_labels(labels, MAX_CLASSES).certain), labels)
    assert pack(torch.ones(MAX_CLASSES, 1, 1).bool()).item() == full(MAX_CLASSES)
    with pytest.raises(ValueError, match='63 classes do not fit'): from_labels(labels, MAX_CLASSES+1)
    with pytest.raises(ValueError, match='63 classes do not fit'): pack(torch.ones(MAX_CLASSES+1, 1, 1).bool())
