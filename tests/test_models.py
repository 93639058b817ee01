"Models from training to file and back, and the ways out of fastai, torch and ONNX."
import json, os, re

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from fastai.learner import load_learner
from fastai.torch_core import set_seed
from torch import nn

from mlds.annotations import Boxes, Mask, Unlabelled
from mlds.catalogue import Catalogue, simulate_budget, split_groups
from mlds.dataloaders import make_dataloaders
from mlds.files import read_mask
from mlds.learner import _lines, best_model, evaluate, fit, make_learner, predict, predict_folder, probabilities
from mlds.models import ModelSpec, load_model, make_network, save_model
from mlds.phantoms.oct import OCT_CLASSES, oct_phantoms
from mlds.task import Task

SMALL = dict(width=4, depth=2, head_width=8)
TIMM = dict(encoder='test_resnet', width=4, head_width=8)


def phantoms(task, annotate=Mask, size=64):
    rows = oct_phantoms(volumes=8, scans=2, size=size, seed=0)
    return split_groups(Catalogue(rows.assign(annotation=rows['mask'].map(annotate)), task))

def overlapping(mask): return Mask(1 << mask.astype(int) | 2*(mask == 3), bits=True)

@pytest.fixture(scope='module')
def scans(): return phantoms(Task(OCT_CLASSES))


def trained(kind, iterations=2):
    "A catalogue and a learner after an epoch."
    set_seed(0)
    if kind == 'exclusive':
        cat, rest = phantoms(Task(OCT_CLASSES)), dict(network=SMALL)
        dls = make_dataloaders(simulate_budget(cat, 4, 'boxes'), bs=4, iterations=iterations, seed=0)
    elif kind == 'overlapping':
        cat, rest = phantoms(Task(OCT_CLASSES, overlapping=True), overlapping), dict(network=TIMM, teacher='none')
        dls = make_dataloaders(cat, bs=4, iterations=iterations, seed=0)
    else:
        cat, rest = phantoms(Task(['IRF', 'SRF'], unit='image')), dict(network=dict(encoder='test_resnet'))
        dls = make_dataloaders(cat, bs=4, iterations=iterations, seed=0)
    learn = make_learner(dls, **rest)
    fit(learn, epochs=1, bar=False)
    return cat, learn

@pytest.fixture(scope='module', params=['exclusive', 'overlapping', 'image'])
def case(request): return trained(request.param)


def same(a, b):
    if isinstance(a, dict): return a == b
    return a.dtype == b.dtype and np.array_equal(a, b)


# A model file

@pytest.mark.parametrize('network', [SMALL, SMALL | dict(negative_slope=.1), TIMM | dict(negative_slope=.1)])
def test_scores_are_those_before_saving_at_any_size(network, tmp_path, scans):
    set_seed(0)
    learn = make_learner(make_dataloaders(scans, bs=4, iterations=12, seed=0), network=network, teacher='none')
    fit(learn, .02, epochs=1, bar=False)
    file = save_model(learn, tmp_path/'m.safetensors')
    for size in (64, 100, 40):
        test = phantoms(scans.task, size=size)[:6]
        before, after = evaluate(learn, test, bar=False), evaluate(file, test, bar=False)
        assert torch.equal(before.counts, after.counts) and before.table.equals(after.table)
        probs = [predict(m, test.image.iloc[0], probabilities=True) for m in (learn, file)]
        assert np.array_equal(*probs) and probs[0].shape == (4, size, size) and probs[0].std() > .01


def test_a_file_says_all_that_prediction_needs(case, tmp_path):
    cat, learn = case
    file = save_model(learn, tmp_path/'m.safetensors', data='phantoms', scores=dict(Dice=.5))
    model = load_model(file)
    assert not model.training and model.spec.task == cat.task and model.spec.size == (64, 64)
    assert model.spec.about == dict(data='phantoms', scores=dict(Dice=.5))
    for image in (cat.image.iloc[0], np.kron(cat.image.iloc[0], np.ones((2, 3)))):
        assert same(predict(file, image), predict(learn, image))
        assert cat.task.unit == 'image' or predict(file, image).shape == image.shape
    card = file.with_suffix('.md').read_text()
    assert all(word in card for word in (*cat.task.classes, '64 x 64', 'phantoms', "load_model('m.safetensors')"))


def test_reading_a_model_draws_no_random_numbers(case, tmp_path):
    file = save_model(case[1], tmp_path/'m.safetensors')
    state = torch.get_rng_state()
    load_model(file)
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_files_are_named(case, tmp_path):
    file = save_model(case[1], tmp_path/'m.safetensors')
    with pytest.raises(FileNotFoundError, match='no model at .*none'): load_model(tmp_path/'none.safetensors')
    cut = tmp_path/'cut.safetensors'
    cut.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match='cut.safetensors is not a safetensors file, or it is damaged'): load_model(cut)
    safetensors.torch.save_file(dict(w=torch.ones(1)), tmp_path/'foreign.safetensors', dict(format='pt'))
    with pytest.raises(ValueError, match='foreign.safetensors was not written by save_model'):
        load_model(tmp_path/'foreign.safetensors')
    with safetensors.safe_open(file, 'pt') as f: meta = f.metadata()
    later = meta | dict(format=str(int(meta['format'])+1), mlds='99.0')
    safetensors.torch.save_file(safetensors.torch.load_file(file), tmp_path/'later.safetensors', later)
    with pytest.raises(ValueError, match='later.safetensors was written by mlds 99.0.*update mlds'):
        load_model(tmp_path/'later.safetensors')
    assert json.loads(meta['spec'])['task']['classes'] == list(case[0].task.classes)


def test_modules_of_ones_own(tmp_path, scans):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
        def forward(self, x): return self.conv(x), []
    with pytest.raises(ValueError, match='the Mine has no description'): predict(Mine(), scans.image.iloc[0])
    dls = make_dataloaders(scans, bs=4, iterations=2)
    learn = make_learner(dls, Mine(), aux_supervision='none', teacher='none', loss=dict(mil=0))
    file = save_model(learn, tmp_path/'mine.safetensors')
    with pytest.raises(ValueError, match='a module that mlds cannot build'): load_model(file)
    assert same(predict(load_model(file, Mine()), scans.image.iloc[0]), predict(learn, scans.image.iloc[0]))


# Prediction

def test_folds_are_averaged(case, tmp_path):
    cat, learn = case
    torch.manual_seed(1)
    other = make_network(cat.task, **learn.model.spec.network)
    other.spec = learn.model.spec
    both = [save_model(m, tmp_path/f'{i}.safetensors') for i, m in enumerate([learn, other])]
    image = cat.image.iloc[0]
    if cat.task.unit == 'image':
        parts = [predict(m, image) for m in both]
        assert predict(both, image) == pytest.approx({k: np.mean([p[k] for p in parts]) for k in parts[0]}, rel=1e-5)
    else:
        parts = [predict(m, image, probabilities=True) for m in both]
        np.testing.assert_allclose(predict(both, image, probabilities=True), np.mean(parts, 0), rtol=1e-4, atol=1e-6)
    stranger = make_network(Task(['background', 'bone']), **SMALL)
    with pytest.raises(ValueError, match='the models have different tasks'): predict([learn, stranger], image)


def test_a_folder_of_images(case, tmp_path):
    cat, learn = case
    table = predict_folder(learn, cat[:3], tmp_path/'out', bar=False)
    assert table.id.tolist() == cat.id[:3].tolist()
    assert len(pd.read_csv(tmp_path/'out/predictions.csv')) == 3
    if cat.task.unit == 'image': return
    for file, image in zip(table.file, cat.image): assert np.array_equal(read_mask(file), predict(learn, image))
    pixels = table[list(cat.task.classes)]
    assert cat.task.overlapping or (pixels.sum(1) == 64*64).all()


def test_mirrored_images(case):
    cat, learn = case
    model, x = best_model(learn), torch.stack([learn.dls.valid.dataset[i][0] for i in range(2)])
    p = probabilities(model, x, flip=True)
    mirrored = probabilities(model, x.flip(-1), flip=True)
    torch.testing.assert_close(p, mirrored.flip(-1) if p.ndim == 4 else mirrored)


# Evaluation

def test_only_what_is_known_counts(scans):
    learn = make_learner(make_dataloaders(scans, bs=4, iterations=2), network=SMALL, teacher='none')
    boxed = scans.assign(annotation=[Boxes([[1, 0, 0, 32, 32]])]*len(scans))
    scores = evaluate(learn, boxed, bar=False)
    assert scores.known == .75
    assert (scores.counts[:, 0, [0, 2]].sum(1) == .75*64*64).all() and not scores.counts[:, 1:, [0, 2]].any()
    with pytest.raises(ValueError, match=f'id {scans.id.iloc[0]}: nothing is known of it'):
        evaluate(learn, scans.assign(annotation=[Unlabelled()]*len(scans)), bar=False)
    with pytest.raises(ValueError, match='the split is empty'): evaluate(learn, scans[:0])
    with pytest.raises(ValueError, match='has no task'): evaluate(learn, pd.DataFrame(scans))


def test_scores_by_image_add_up_to_the_counts(case):
    cat, learn = case
    if cat.task.unit == 'image':
        scores = evaluate(learn, cat, bar=False)
        assert scores.probs.shape == (len(cat), 2) and list(scores.table.index) == ['IRF', 'SRF', 'mean']
        blank = cat.assign(IRF=np.nan, SRF=np.nan)
        with pytest.raises(ValueError, match=f'id {cat.id.iloc[0]}: no label of it is known'):
            evaluate(learn, blank, blank='ignore', bar=False)
        return
    scores = evaluate(learn, cat, bar=False)
    total = scores.per_image.groupby('class', sort=False)[['TP', 'FP', 'FN']].sum()
    assert np.array_equal(total.values, scores.counts.sum(0).numpy()) and list(total.index) == list(cat.task.classes)
    assert scores.known == 1 and len(scores.pred) == len(cat)


# Progress

def test_lines_in_a_log(capsys):
    cat, learn = trained('overlapping')
    fit(learn, epochs=2, bar=False)
    lines = capsys.readouterr().out.strip().split('\n')
    scores = ' '.join(rf'\| {name} \d+\.\d+' for name in ('train_loss', 'valid_loss', 'foreground_iou'))
    pattern = rf'epoch 2/2 {scores} \| \d+:\d\d, 0:00 left'
    assert re.fullmatch(pattern, lines[-1]), lines[-1]

def test_what_is_piped_holds_results_alone(capsys):
    assert list(_lines('ab', 2, 'predict ', every=0)) == ['a', 'b']
    said = capsys.readouterr()
    assert said.out == '' and re.fullmatch(r'predict 1/2, \d+:\d\d left\npredict 2/2, 0:00 left\n', said.err)


# The ways out

def test_fastai_summary_predict_show_and_export(case, tmp_path):
    cat, learn = case
    image = cat.image.iloc[0]
    assert 'Total params' in learn.summary()
    assert same(learn.predict(image), predict(learn, image))
    assert learn.show_results(max_n=2) is not None
    probs, targets, decoded = learn.get_preds(with_decoded=True)
    assert len(probs) == len(targets) == len(decoded) == len(learn.dls.valid.dataset)
    assert 0 <= probs.min() and probs.max() <= 1
    learn.export(tmp_path/'learner.pkl')
    again = load_learner(tmp_path/'learner.pkl')
    assert same(again.predict(image), learn.predict(image)) and len(again.dls.train.dataset) == 0


@pytest.mark.parametrize('kind', ['exclusive', 'overlapping', 'image'])
def test_tensorboard(kind, tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    cat, learn = trained(kind)
    fit_one = lambda **kwargs: learn.fit_one_cycle(1, .01, cbs=TensorBoardCallback(tmp_path/'tb', **kwargs))
    with learn.no_bar(), learn.no_logging(): fit_one(log_preds=kind != 'image')
    assert list((tmp_path/'tb').glob('events*'))


@pytest.mark.parametrize('kind', ['exclusive', 'image'])
def test_weights_and_biases(kind, tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    from fastai.callback.wandb import WandbCallback
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    cat, learn = trained(kind)
    run = wandb.init(dir=tmp_path, project='mlds')
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, .01, cbs=WandbCallback(log_preds=False))
        assert all(c in str(run.config['task']) for c in cat.task.classes)
        assert 'train_loss' in run.summary.keys()
    finally: wandb.finish()


def logits(out): return out[0] if isinstance(out, tuple) else out

def images(learn, n): return torch.stack([learn.dls.valid.dataset[i][0].as_subclass(torch.Tensor) for i in range(n)])

def test_torch_export(case):
    model, x = best_model(case[1]), images(case[1], 3)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(logits(program.module()(x[:2])), logits(model(x[:2])))


def test_onnx(case, tmp_path):
    pytest.importorskip('onnx'); pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model, x = best_model(case[1]), images(case[1], 2)
    torch.onnx.export(model, (x,), tmp_path/'m.onnx', dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path/'m.onnx')
    out = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(out[0], logits(model(x)).detach().numpy(), atol=1e-4)
