"Properties of `mlds.metrics`, against scikit-learn and against each other."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import stats
from sklearn.metrics import f1_score, jaccard_score, roc_auc_score

from mlds.classsets import class_sets, from_labels
from mlds.metrics import (ForegroundDice, ForegroundIoU, auroc_table, batch_counts, bootstrap_interval,
                          calibration_error, dice, foreground_dice, foreground_iou, group_weights, iou, known_classes,
                          localisation_table, overlap_counts, pointing_hits, score_table, weighted_auroc)
from mlds.study.statistics import seed_interval
from mlds.task import Task

check = lambda *strategies: lambda f: settings(max_examples=40, deadline=None)(given(*strategies)(f))
C = 4
TASK = Task(('background', 'b', 'c', 'd'))
shapes = array_shapes(min_dims=3, max_dims=3, max_side=6)
two = lambda high, s: [arrays(np.int64, s, elements=st.integers(0, high)) for _ in range(2)]
images = lambda high: shapes.flatmap(lambda s: st.tuples(*two(high, s)))
known_too = lambda high: shapes.flatmap(lambda s: st.tuples(*two(high, s), arrays(bool, s)))
tensors = lambda xs: [torch.from_numpy(x) for x in xs]


@check(images(C-1))
def test_single_label_agrees_with_sklearn(pair):
    pred, target = pair
    counts = overlap_counts(*[1 << x for x in tensors(pair)], C).sum(0)
    present = [c for c in range(C) if (pred == c).any() or (target == c).any()]
    args = dict(labels=present, average=None)
    np.testing.assert_allclose(iou(counts)[present], jaccard_score(target.ravel(), pred.ravel(), **args))
    np.testing.assert_allclose(dice(counts)[present], f1_score(target.ravel(), pred.ravel(), **args))
    assert iou(counts).isnan().nonzero().ravel().tolist() == [c for c in range(C) if c not in present]


@check(known_too(2**C-1))
def test_multilabel_counts_agree_with_a_plain_loop(triple):
    pred, target, known = triple
    counts = overlap_counts(*tensors(triple)[:2], C, torch.from_numpy(known))
    for b in range(len(pred)):
        for c in range(C):
            p, t = (x[b][known[b]] >> c & 1 for x in (pred, target))
            assert counts[b, c].tolist() == [(p & t).sum(), (p & (1-t)).sum(), ((1-p) & t).sum()]


@check(images(2**C-1))
def test_scores_are_symmetric_bounded_and_consistent(pair):
    a, b = tensors(pair)
    ab, ba, same = (overlap_counts(x, y, C).sum(0) for x, y in ((a, b), (b, a), (a, a)))
    torch.testing.assert_close(iou(ab), iou(ba), equal_nan=True)
    torch.testing.assert_close(dice(ab), 2*iou(ab)/(1+iou(ab)), equal_nan=True)
    assert ((iou(ab) >= 0) & (iou(ab) <= 1) | iou(ab).isnan()).all()
    assert (iou(same).nan_to_num(1) == 1).all()


@check(images(C-1), st.permutations(range(1, C)))
def test_mean_does_not_depend_on_the_order_of_the_foreground(pair, order):
    table = torch.tensor([0, *order])
    both = tensors(pair), [table[x] for x in tensors(pair)]
    counts, renamed = (overlap_counts(*[1 << x for x in xs], C).sum(0) for xs in both)
    torch.testing.assert_close(foreground_iou(counts), foreground_iou(renamed), equal_nan=True)


@check(images(C-1))
def test_table_accumulates_whatever_the_batches(pair):
    counts = overlap_counts(*[1 << x for x in tensors(pair)], C)
    table = score_table(counts, TASK)
    np.testing.assert_allclose(table.IoU, score_table(counts.sum(0), TASK).IoU)
    np.testing.assert_allclose(table.loc['mean foreground', 'IoU'], foreground_iou(counts.sum(0)))


def test_empty_rules():
    nothing = torch.zeros(C, 3)
    assert iou(nothing).isnan().all() and foreground_iou(nothing).isnan()
    stray = nothing.clone()
    stray[1, 1] = 1
    assert foreground_iou(stray) == 0


@pytest.mark.parametrize('bad', [1 << C, -1, 1 << 62])
def test_classes_out_of_range(bad):
    fine = torch.ones(1, 2, 2, dtype=torch.long)
    wrong = fine.clone()
    wrong[0, 0, 0] = bad
    with pytest.raises(ValueError, match='pred has class set'): overlap_counts(wrong, fine, C)
    with pytest.raises(ValueError, match='target has class set'): overlap_counts(fine, wrong, C)


@check(st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=4, max_size=12), st.integers(0, 99))
def test_bootstrap_is_ordered_reproducible_and_blind_to_names(rows, seed):
    counts = torch.tensor(rows)[:, None].expand(-1, 2, -1)
    groups = np.arange(len(rows)) // 2
    low, high = bootstrap_interval(counts, groups, n=50, seed=seed)
    assert np.isnan(low) or 0 <= low <= high <= 1
    again = bootstrap_interval(counts, [f'patient {g}' for g in groups], n=50, seed=seed)
    np.testing.assert_equal((low, high), again)


def test_bootstrap_of_identical_groups_has_no_width():
    counts = torch.tensor([[[5, 0, 5], [3, 1, 0]]]).expand(6, -1, -1)
    low, high = bootstrap_interval(counts, range(6))
    assert low == high == .75
    assert np.isnan(bootstrap_interval(counts, ['one']*6)).all()


@check(st.lists(st.floats(0, 1), min_size=2, max_size=10), st.floats(.5, .99))
def test_seed_interval_is_students(values, coverage):
    mean, low, high = seed_interval(values, coverage)
    assert low <= mean <= high
    p = stats.ttest_1samp(values, low).pvalue
    if stats.sem(values) > 1e-3: assert p == pytest.approx(1-coverage, rel=1e-4)


THREE = Task(('background', 'b', 'c'))


@check(st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_metric_is_independent_of_the_batch_size(size, seed, overlapping):
    torch.manual_seed(seed)
    task = Task(THREE.classes, overlapping)
    logits, sets = torch.randn(5, 3, 4, 4), from_labels(torch.randint(3, (5, 4, 4)), 3)
    for Score, stat in ((ForegroundIoU, foreground_iou), (ForegroundDice, foreground_dice)):
        metric = Score(task)
        for x, y in zip(logits.split(size), sets.split(size)):
            metric.accumulate(type('Learn', (), dict(pred=x, yb=(y,))))
        torch.testing.assert_close(metric.value, stat(batch_counts(logits, sets, task).sum(0)).item(), equal_nan=True)
        assert metric.name == stat.__name__


def test_open_pixels_do_not_count():
    certain = torch.tensor([[[0b01, 0b00, 0b10]]])
    possible = torch.tensor([[[0b01, 0b11, 0b10]]])
    logits = torch.tensor([[0., 0., 0.], [9., 9., 9.]])[None, :, None]
    counts = batch_counts(logits, class_sets(certain, possible), Task(('background', 'b')))
    assert counts.tolist() == [[[0, 0, 1], [1, 1, 0]]]


def test_overlapping_classes_are_known_one_by_one():
    "Lungs drawn, heart open: the lungs count everywhere, the heart nowhere."
    certain, possible = torch.tensor([[[0b010, 0b001]]]), torch.tensor([[[0b110, 0b101]]])
    logits = torch.tensor([[-9., -9.], [9., 9.], [9., 9.]])[None, :, None]
    sets = class_sets(certain, possible)
    overlapping = batch_counts(logits, sets, Task(THREE.classes, overlapping=True))
    assert overlapping.tolist() == [[[0, 0, 1], [1, 1, 0], [0, 0, 0]]]
    assert not batch_counts(logits, sets, THREE).any()


@check(known_too(2**C-1))
def test_known_pixels_are_pixels_whose_classes_are_all_known(triple):
    pred, target = tensors(triple)[:2]
    known = torch.from_numpy(triple[2])
    bits = torch.where(known, 2**C-1, 0)
    assert torch.equal(overlap_counts(pred, target, C, known), overlap_counts(pred, target, C, bits))


@check(images(2**C-1))
def test_known_classes_by_loops(pair):
    certain, more = tensors(pair)
    sets = class_sets(certain, certain | more)
    single, several = known_classes(sets, TASK), known_classes(sets, Task(TASK.classes, overlapping=True))
    for c in range(C): assert torch.equal(several >> c & 1, 1 - (~certain & more) // 2**c % 2)
    assert torch.equal(single == 2**C-1, sets.known) and ((single == 0) | sets.known).all()


@check(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.integers(0, 9))
def test_group_weights_draw_whole_groups(groups, seed):
    weights, number = group_weights(groups, 30, seed), len(set(groups))
    assert weights.shape == (30, len(groups))
    if number == 1: assert np.isnan(weights).all(); return
    first = [groups.index(g) for g in dict.fromkeys(groups)]
    assert (weights[:, first].sum(1) == number).all() and (weights >= 0).all()
    for i, g in enumerate(groups): assert (weights[:, i] == weights[:, groups.index(g)]).all()


def test_one_bootstrap_for_counts_and_ranks():
    "Counts weighted image by image: the draws of `group_weights`, which AUROC uses too."
    groups = np.arange(12) // 2
    weights = group_weights(groups, 40, seed=3)
    counts = torch.randint(0, 9, (12, 1, 3), generator=torch.Generator().manual_seed(0))
    draws = [iou((counts * torch.tensor(w)[:, None, None]).sum(0)).item() for w in weights]
    expect = np.quantile(draws, [.05, .95])
    np.testing.assert_allclose(bootstrap_interval(counts, groups, lambda c: iou(c)[..., 0], 40, .9, seed=3), expect)


def test_auroc_intervals_come_from_the_draws():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 2, (60, 2)).astype(float), rng.integers(0, 20, 60)
    probs = labels + rng.normal(size=(60, 2))
    table = auroc_table(probs, labels, groups, ['a', 'b'], n=50, coverage=.8)
    areas = np.stack([weighted_auroc(p, y == 1, group_weights(groups, 50)) for p, y in zip(probs.T, labels.T)], 1)
    expect = np.quantile(np.c_[areas, areas.mean(1)], [.1, .9], axis=0)
    np.testing.assert_allclose(table[['low', 'high']].T, expect)


@pytest.mark.parametrize('least, bounded', [(5, True), (6, False)])
def test_observations_with_too_few_positives_have_no_interval(least, bounded):
    labels = np.array([1]*5 + [0]*7)[:, None]
    table = auroc_table(np.arange(12.)[::-1, None], labels, range(12), ['a'], least=least, n=20)
    assert table.AUROC[0] == 1 and table.low.notna().tolist() == [bounded]*2
    assert table.positives.tolist() == [5, 5 if bounded else 0]


def test_calibration_error_of_perfect_and_opposite_answers():
    labels = torch.tensor([[0., 1, 1, 0, torch.nan]]).T
    assert calibration_error(labels.nan_to_num(.3), labels).item() == 0
    assert calibration_error(1 - labels.nan_to_num(.3), labels).item() == 1


def test_score_table_with_groups_has_the_interval_of_each_score():
    counts, groups = torch.randint(0, 9, (8, C, 3), generator=torch.Generator().manual_seed(0)), list('aabbccdd')
    table = score_table(counts, TASK, groups, n=100)
    for name, score in (('IoU', iou), ('Dice', dice)):
        bounds = [bootstrap_interval(counts, groups, lambda x: score(x)[..., c], 100) for c in range(C)]
        np.testing.assert_allclose(table[[f'{name} low', f'{name} high']][:-1], bounds)
    last = table.iloc[-1][['IoU low', 'IoU high']].tolist()
    np.testing.assert_allclose(last, bootstrap_interval(counts, groups, n=100))


def test_a_class_that_never_occurs_has_no_score_and_no_interval():
    counts = torch.tensor([[[5, 1, 0], [0, 0, 0]], [[3, 0, 2], [0, 0, 0]]])
    table = score_table(counts, Task(('background', 'b')), ['a', 'b'], n=20)
    assert table.loc[['b', 'mean foreground']].isna().all(None) and table.loc['background'].notna().all()


def test_localisation_ignores_images_that_were_not_explained():
    target = torch.ones(2, 4, 4).long()
    target[:, 0, 0] = 0b10
    pred = torch.stack([target[0], torch.full((4, 4), 0b10)])
    labelled = torch.tensor([[True], [False]])
    table = localisation_table(pred, target, labelled, ['a'], ['p', 'q'], n=20)
    assert table.IoU.tolist() == [1, 1] and table.images.tolist() == [1, 1]


tolerances = st.sampled_from([0, .125, .25, .375, .5]) # exact in binary

@check(st.integers(0, 999), st.integers(2, 9), st.integers(2, 9), tolerances)
def test_pointing_game_by_loops(seed, h, w, tolerance):
    g = torch.Generator().manual_seed(seed)
    maps, target = torch.rand(3, h, w, generator=g), torch.randint(0, 8, (2, h, w), generator=g)
    pairs = torch.tensor([[0, 0], [0, 1], [1, 1]])
    hits = pointing_hits(maps, pairs, target, 2, tolerance)
    assert hits[1, 0].isnan()
    for m, (i, k) in zip(maps, pairs.tolist()):
        y, x = divmod(m.argmax().item(), w)
        places = (target[i] >> k+1 & 1).nonzero().tolist()
        if not places: assert hits[i, k].isnan(); continue
        squared = min((y-a)**2 + (x-b)**2 for a, b in places)
        assert hits[i, k] == (squared <= (tolerance*h)**2)


@check(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=2, max_size=15))
def test_weighted_auroc_agrees_with_sklearn(rows):
    "With few scores, so that many are equal."
    scores, target, weights = map(np.array, zip(*rows))
    sides = [weights[target == t].sum() for t in (True, False)]
    found, = weighted_auroc(scores.astype(float), target, weights[None])
    if all(sides): assert found == pytest.approx(roc_auc_score(target, scores, sample_weight=weights))
    else: assert np.isnan(found)
