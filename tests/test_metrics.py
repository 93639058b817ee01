"Properties of `mlds.metrics`, against scikit-learn and against each other."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import stats
from sklearn.metrics import f1_score, jaccard_score

from mlds.classsets import class_sets, from_labels
from mlds.metrics import (ForegroundIoU, batch_counts, bootstrap_interval, dice, foreground_iou, iou, mean_foreground,
                          overlap_counts, paired_interval, score_table, seed_interval)

check = lambda *strategies: lambda f: settings(max_examples=40, deadline=None)(given(*strategies)(f))
C = 4
shapes = array_shapes(min_dims=3, max_dims=3, max_side=6)
images = lambda high: shapes.flatmap(lambda s: st.tuples(*[arrays(np.int64, s, elements=st.integers(0, high)) for _ in range(2)]))
known_too = lambda high: shapes.flatmap(lambda s: st.tuples(*[arrays(np.int64, s, elements=st.integers(0, high)) for _ in range(2)], arrays(bool, s)))
tensors = lambda xs: [torch.from_numpy(x) for x in xs]


@check(images(C-1))
def test_single_label_agrees_with_sklearn(pair):
    pred, true = pair
    counts = overlap_counts(*[1 << x for x in tensors(pair)], C).sum(0)
    present = [c for c in range(C) if (pred == c).any() or (true == c).any()]
    args = dict(labels=present, average=None)
    np.testing.assert_allclose(iou(counts)[present], jaccard_score(true.ravel(), pred.ravel(), **args))
    np.testing.assert_allclose(dice(counts)[present], f1_score(true.ravel(), pred.ravel(), **args))
    assert iou(counts).isnan().nonzero().ravel().tolist() == [c for c in range(C) if c not in present]


@check(known_too(2**C-1))
def test_multilabel_counts_agree_with_a_plain_loop(triple):
    pred, true, known = triple
    counts = overlap_counts(*tensors(triple)[:2], C, torch.from_numpy(known))
    for b in range(len(pred)):
        for c in range(C):
            p, t = (x[b][known[b]] >> c & 1 for x in (pred, true))
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
    counts, renamed = (overlap_counts(*[1 << x for x in xs], C).sum(0) for xs in (tensors(pair), [table[x] for x in tensors(pair)]))
    torch.testing.assert_close(foreground_iou(counts), foreground_iou(renamed), equal_nan=True)


@check(images(C-1))
def test_table_accumulates_whatever_the_batches(pair):
    counts = overlap_counts(*[1 << x for x in tensors(pair)], C)
    table = score_table(counts, list('abcd'))
    np.testing.assert_allclose(table.IoU, score_table(counts.sum(0), list('abcd')).IoU)
    np.testing.assert_allclose(table.loc['mean foreground', 'IoU'], mean_foreground(iou(counts.sum(0))))


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
    with pytest.raises(ValueError, match='true has class set'): overlap_counts(fine, wrong, C)


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
def test_seed_interval_is_students(values, level):
    mean, low, high = seed_interval(values, level)
    assert low <= mean <= high
    p = stats.ttest_1samp(values, low).pvalue
    if stats.sem(values) > 1e-3: assert p == pytest.approx(1-level, rel=1e-4)


@check(st.dictionaries(st.integers(0, 20), st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2))
def test_paired_interval_matches_seeds(runs):
    a, b = {k: v[0] for k, v in runs.items()}, {k: v[1] for k, v in reversed(runs.items())}
    np.testing.assert_allclose(paired_interval(a, b), seed_interval([x-y for x, y in runs.values()]), atol=1e-12)
    np.testing.assert_allclose(paired_interval(a, b)[0], -paired_interval(b, a)[0], atol=1e-12)


@check(st.integers(1, 5), st.integers(0, 99))
def test_metric_is_independent_of_the_batch_size(size, seed):
    torch.manual_seed(seed)
    logits, sets = torch.randn(5, 3, 4, 4), from_labels(torch.randint(3, (5, 4, 4)), 3)
    metric = ForegroundIoU()
    for x, y in zip(logits.split(size), sets.split(size)):
        metric.accumulate(type('Learn', (), dict(pred=x, yb=(y,))))
    torch.testing.assert_close(metric.value, foreground_iou(batch_counts(logits, sets).sum(0)).item(), equal_nan=True)


def test_open_pixels_do_not_count():
    certain = torch.tensor([[[0b01, 0b00, 0b10]]])
    possible = torch.tensor([[[0b01, 0b11, 0b10]]])
    logits = torch.tensor([[0., 0., 0.], [9., 9., 9.]])[None, :, None]
    assert batch_counts(logits, class_sets(certain, possible)).tolist() == [[[0, 0, 1], [1, 1, 0]]]
