"What annotation tools write is read back: masks as they were, weaker shapes as class sets that hold the truth."
import base64, csv, io, json
from functools import partial
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from matplotlib.path import Path as Outline
from PIL import Image

from mlds.annotations import Boxes, ImageLabels, Mask, PartialMask, Points, _innermost, _structures, boxes_of
from mlds.classsets import MAX_CLASSES, TIGHT, class_sets, from_labels
from mlds.folders import check_folder, read_folder
from mlds.sources.tools import Shapes, _coco_counts, _polygon, read_annotations
from test_annotations import assert_contains, random_labels

NAMES = ['background', 'fluid & "co"', 'drüse']
check = lambda *strategies, n=25: lambda f: settings(max_examples=n, deadline=None)(given(*strategies)(f))
seeds, side = st.integers(0, 2**31), st.integers(2, 14)
torch.set_num_threads(1)


def read(name, content, options):
    "Write an export to a file of that name, and read it."
    with TemporaryDirectory() as folder:
        file = Path(folder)/name
        if callable(content): content(file)
        else: file.write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8')
        return read_annotations(file, NAMES, **options)['a']

def counted(mask, order):
    "Run lengths, outside first."
    edges = np.flatnonzero(np.diff(mask.ravel(order), prepend=False))
    return np.diff([0, *edges, mask.size]).tolist()

def compressed(counts):
    "COCO's text for run lengths, written from the comments of its maskApi.c."
    text = ''
    for i, count in enumerate(counts):
        value, more = count - counts[i-2] if i > 2 else count, True
        while more:
            group = value & 31
            value >>= 5
            more = value != (-1 if group & 16 else 0)
            text += chr((group | 32*more) + 48)
    return text

def bars(mask):
    "The runs of each row as rectangles: polygons that make up the mask."
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(row.astype(int), prepend=0, append=0)).tolist()
        for x0, x1 in zip(edges[::2], edges[1::2]): yield [(x0, y), (x1, y), (x1, y+1), (x0, y+1)]

def flat(points): return [v for point in points for v in point]
def classes_of(labels): return [(NAMES[c], labels == c) for c in (1, 2) if (labels == c).any()]
def outlines(labels): return [(name, bar) for name, mask in classes_of(labels) for bar in bars(mask)]


def coco(segmentations, size):
    "A COCO file of class ids with their segmentations."
    entries = [{'id': i, 'image_id': 3, 'category_id': c+10, 'segmentation': s, 'iscrowd': 0, 'bbox': [0, 0, 1, 1]}
               for i, (c, s) in enumerate(segmentations)]
    return {'images': [{'id': 3, 'file_name': 'x/a.png', 'height': size[0], 'width': size[1]}], 'annotations': entries,
            'categories': [{'id': c+10, 'name': n} for c, n in enumerate(NAMES)]}

def cvat(elements, size):
    image = f'<image id="0" name="x/a.png" width="{size[1]}" height="{size[0]}">{"".join(elements)}</image>'
    return f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>{image}</annotations>'

def element(tag, name, **attributes):
    said = ' '.join(f'{k}="{v}"' for k, v in attributes.items())
    return f'<{tag} label="{escape(name)}" source="manual" {said}></{tag}>'

def cvat_points(points): return ';'.join(f'{x:.2f},{y:.2f}' for x, y in points)

def studio(results, size):
    about = {'original_height': size[0], 'original_width': size[1], 'image_rotation': 0, 'to_name': 'image'}
    rows = [{**about, 'id': str(i), 'type': kind, 'value': {**value, kind: [name]}}
            for i, (kind, name, value) in enumerate(results)]
    return [{'id': 1, 'data': {'image': '/data/upload/2/01234567-a.png'}, 'annotations': [{'id': 1, 'result': rows}]}]

def percent(points, size): return [[100*x/size[1], 100*y/size[0]] for x, y in points]

def brush(mask):
    "Label Studio's packed run lengths of red, green, blue and alpha."
    bits = f'{4*mask.size:032b}{7:05b}' + ''.join(f'{n-1:04b}' for n in (3, 4, 8, 16))
    for value in mask.ravel(): bits += f'1{0:02b}{3:03b}{255*int(value):08b}' # four times the same
    return [int(bits[i:i+8].ljust(8, '0'), 2) for i in range(0, len(bits), 8)]

def labelme(shapes, size):
    rows = [{'label': name, 'shape_type': kind, 'flags': {}, 'group_id': None, **more} for name, kind, more in shapes]
    return {'version': '5.4.1', 'flags': {}, 'shapes': rows, 'imagePath': 'C:\\x\\a.png', 'imageData': None,
            'imageHeight': size[0], 'imageWidth': size[1]}

def png(mask):
    file = io.BytesIO()
    Image.fromarray(mask).save(file, 'PNG')
    return base64.b64encode(file.getvalue()).decode()

def via(shapes):
    regions = [{'shape_attributes': s, 'region_attributes': {'class': name}} for name, s in shapes]
    return {'a.png99': {'filename': 'a.png', 'size': 99, 'regions': regions, 'file_attributes': {}}}

def via_csv(content, file):
    item, = content.values()
    with open(file, 'w', newline='', encoding='utf-8') as f:
        rows = csv.writer(f)
        rows.writerow(['filename', 'file_size', 'file_attributes', 'region_count', 'region_id',
                       'region_shape_attributes', 'region_attributes'])
        for i, r in enumerate(item['regions']):
            texts = [json.dumps(r[k]) for k in ('shape_attributes', 'region_attributes')]
            rows.writerow(['a.png', 99, '{}', len(item['regions']), i, *texts])

def slicer(labels, file, layered):
    sitk = pytest.importorskip('SimpleITK')
    layers = np.stack([labels == 1, labels == 2], -1)[None] if layered else labels.reshape(-1, *labels.shape[-2:])
    image = sitk.GetImageFromArray(layers.astype(np.uint8), isVector=layered)
    for c in (1, 2):
        said = {'Name': NAMES[c], 'Layer': str((c-1)*layered), 'LabelValue': str(1 if layered else c)}
        for k, v in said.items(): image.SetMetaData(f'Segment{c-1}_{k}', v)
    sitk.WriteImage(image, str(file))


def via_polygons(labels):
    def shape(bar): return {'name': 'polygon', 'all_points_x': [x for x, _ in bar], 'all_points_y': [y for _, y in bar]}
    return via([(name, shape(bar)) for name, bar in outlines(labels)])

def coco_runs(labels, how):
    size = labels.shape
    rows = [(NAMES.index(n), {'counts': how(counted(m, 'F')), 'size': list(size)}) for n, m in classes_of(labels)]
    return coco(rows, size)

def cvat_mask(name, mask):
    y, x = np.nonzero(mask)
    top, left, height, width = y.min(), x.min(), np.ptp(y) + 1, np.ptp(x) + 1
    rle = ', '.join(map(str, counted(mask[top:top+height, left:left+width], 'C')))
    return element('mask', name, rle=rle, left=left, top=top, width=width, height=height)

def labelme_mask(name, mask):
    y, x = np.nonzero(mask)
    part = mask[y.min():y.max()+1, x.min():x.max()+1]
    corners = [[int(x.min()), int(y.min())], [int(x.max()), int(y.max())]]
    return name, 'mask', {'points': corners, 'mask': png(part)}

MASKS = {
    'coco runs': ('a.json', lambda l: coco_runs(l, list)),
    'coco text': ('a.json', lambda l: coco_runs(l, compressed)),
    'coco polygons': ('a.json', lambda l: coco([(NAMES.index(n), [flat(b) for b in bars(m)])
                                                for n, m in classes_of(l)], l.shape)),
    'cvat masks': ('a.xml', lambda l: cvat([cvat_mask(n, m) for n, m in classes_of(l)], l.shape)),
    'cvat polygons': ('a.xml', lambda l: cvat([element('polygon', n, points=cvat_points(b)) for n, b in outlines(l)],
                                              l.shape)),
    'studio brush': ('a.json', lambda l: studio([('brushlabels', n, {'format': 'rle', 'rle': brush(m)})
                                                 for n, m in classes_of(l)], l.shape)),
    'studio polygons': ('a.json', lambda l: studio([('polygonlabels', n, {'points': percent(b, l.shape)})
                                                    for n, b in outlines(l)], l.shape)),
    'labelme masks': ('a.json', lambda l: labelme([labelme_mask(n, m) for n, m in classes_of(l)], l.shape)),
    'labelme polygons': ('a.json', lambda l: labelme([(n, 'polygon', {'points': b}) for n, b in outlines(l)], l.shape)),
    'via json': ('a.json', via_polygons),
    'via csv': ('a.csv', lambda l: partial(via_csv, via_polygons(l))),
    'slicer': ('a.seg.nrrd', lambda l: partial(slicer, l, layered=False)),
    'slicer layers': ('a.seg.nrrd', lambda l: partial(slicer, l, layered=True))}

def sets_of(seed, h, w, overlapping):
    "Random class sets with some foreground."
    labels, more = labels_of(seed, h, w).astype(int), random_labels(seed+1, h, w, 3).numpy()
    sets = 1 << labels | (1 << more if overlapping else 0)
    return np.where(sets > 1, sets & ~1, 1)

def labels_of(seed, h, w):
    labels = random_labels(seed, h, w, 3).numpy().astype(np.uint8)
    assume(labels.any())
    return labels

@pytest.mark.parametrize('kind', MASKS)
def test_masks_come_back(kind):
    name, export = MASKS[kind]
    @check(seeds, side, side)
    def comes_back(seed, h, w):
        labels = labels_of(seed, h, w)
        mask = read(name, export(labels), dict(exhaustive=True, images={'a': (h, w)}))
        assert type(mask) is Mask and (mask.labels == labels).all()
        partly = read(name, export(labels), dict(exhaustive=NAMES[1:2], images={'a': (h, w)}))
        assert type(partly) is PartialMask and partly.looked_for == [1]
        assert_contains(partly.class_sets((h, w), 3), from_labels(torch.from_numpy(labels), 3), 3)
    comes_back()

@check(st.lists(st.integers(0, 5000), min_size=1, max_size=30))
def test_compressed_runs_come_back(counts): assert _coco_counts(compressed(counts)) == counts

def test_what_pycocotools_wrote():
    "Frozen from pycocotools 2.0: a ring with a single pixel."
    assert compressed(_coco_counts('j04400MN020N02300e0M')) == 'j04400MN020N02300e0M'

def near_an_edge(points, places):
    "Whether a place lies on one of a polygon's sides."
    for a, b in zip(points, np.roll(points, -1, axis=0)):
        along = np.clip(((places - a) @ (b - a)) / max(np.sum((b - a)**2), 1e-12), 0, 1)
        if np.hypot(*(places - a - along[:, None]*(b - a)).T).min() < 1e-6: return True

@check(st.lists(st.tuples(st.floats(0, 14), st.floats(0, 11)), min_size=3, max_size=3), n=60)
def test_polygons_hold_the_centres_that_matplotlib_finds(points):
    centres = np.stack(np.meshgrid(np.arange(14) + .5, np.arange(11) + .5), -1).reshape(-1, 2)
    assume(np.max(points) > 1 and not near_an_edge(np.array(points), centres))
    inside = Outline([*points, points[0]]).contains_points(centres)
    assert (_polygon(points, (11, 14)).ravel() == inside).all()


BOXES = {
    'coco': lambda rows, size: {**(c := coco([(r[0], []) for r in rows], size)),
                                'annotations': [{**a, 'bbox': [x0, y0, x1-x0, y1-y0]}
                                                for a, (_, x0, y0, x1, y1) in zip(c['annotations'], rows)]},
    'cvat': lambda rows, size: cvat([element('box', NAMES[c], xtl=x0, ytl=y0, xbr=x1, ybr=y1)
                                     for c, x0, y0, x1, y1 in rows], size),
    'studio': lambda rows, size: studio([('rectanglelabels', NAMES[c], {
        'x': 100*x0/size[1], 'y': 100*y0/size[0], 'width': 100*(x1-x0)/size[1], 'height': 100*(y1-y0)/size[0],
        'rotation': 0}) for c, x0, y0, x1, y1 in rows], size),
    'labelme': lambda rows, size: labelme([(NAMES[c], 'rectangle', {'points': [[x1, y0], [x0, y1]]})
                                           for c, x0, y0, x1, y1 in rows], size),
    'via': lambda rows, size: via([(NAMES[c], {'name': 'rect', 'x': x0, 'y': y0, 'width': x1-x0, 'height': y1-y0})
                                   for c, x0, y0, x1, y1 in rows])}

@pytest.mark.parametrize('tool', BOXES)
def test_boxes_come_back(tool):
    @check(seeds, side, side)
    def comes_back(seed, h, w):
        labels = labels_of(seed, h, w)
        rows, told = boxes_of(1 << labels.astype(int), 3), {'images': {'a': (h, w)}}
        export = BOXES[tool](rows, (h, w))
        boxes = read('a.xml', export, dict(exhaustive=True, tight=True, **told))
        assert boxes == Boxes(rows, tight=True)
        truth = from_labels(torch.from_numpy(labels), 3)
        for exhaustive in (NAMES[1:2], False):
            some = read('a.xml', export, dict(exhaustive=exhaustive, **told))
            assert type(some) is Shapes
            assert_contains(some.class_sets((h, w), 3), truth, 3)
    comes_back()

def within(x, y):
    "A point of the pixel; (.5, .5) might be relative, and is refused."
    return (x + .5, y + .5) if max(x, y) else (x, y)

@check(seeds, side, side)
def test_points_come_back(seed, h, w):
    labels = labels_of(seed, h, w)
    rows = [(c, *_innermost(p)) for c, p in _structures(1 << labels.astype(int), 3)]
    centres = [(NAMES[c], within(x, y)) for c, x, y in rows]
    exports = [cvat([element('points', n, points=cvat_points([p])) for n, p in centres], (h, w)),
               labelme([(n, 'point', {'points': [p]}) for n, p in centres], (h, w)),
               via([(n, {'name': 'point', 'cx': p[0], 'cy': p[1]}) for n, p in centres]),
               studio([('keypointlabels', n, dict(zip('xy', percent([p], (h, w))[0]))) for n, p in centres], (h, w))]
    for export in exports:
        points = read('a.json', export, dict(exhaustive=True, images={'a': (h, w)}))
        assert type(points) is Points
        sets = points.class_sets((h, w), 3)
        assert (sets == Points(rows).class_sets((h, w), 3)).all()
        assert_contains(sets, from_labels(torch.from_numpy(labels), 3), 3)


def assert_tight(regions, truth):
    "Each row and column of a region that is flagged as tight holds its class."
    for k in range(MAX_CLASSES):
        region, held = regions >> k & 1 > 0, truth >> k % 3 & 1 > 0
        if not (region & (regions & TIGHT != 0)).any(): continue
        for axis in (0, 1): assert ((region & held).any(axis) == region.any(axis)).all()

def marked(rng, c, part):
    "A structure as one of CVAT's elements."
    name = NAMES[c]
    y0, x0, y1, x1 = part.bbox
    x, y = within(*_innermost(part))
    rle = ', '.join(map(str, counted(part.image, 'C')))
    return [element('mask', name, rle=rle, left=x0, top=y0, width=x1-x0, height=y1-y0),
            element('box', name, xtl=x0, ytl=y0, xbr=x1, ybr=y1),
            element('points', name, points=f'{x},{y}'),
            element('polyline', name, points=f'{x},{y};{x},{y}')][rng.integers(4)]

@check(seeds, side, side, st.sampled_from([[], NAMES[1:2], NAMES[2:], NAMES[1:]]), st.booleans(), st.booleans(),
       st.booleans(), n=120)
def test_whatever_is_mixed_holds_the_truth(seed, h, w, exhaustive, tight, tagged, overlapping):
    "Structures of classes that are not exhaustive are dropped by chance; a class may have a label only."
    truth, rng = sets_of(seed, h, w, overlapping), np.random.default_rng(seed)
    found = _structures(truth, 3)
    kept = [(c, p) for c, p in found if NAMES[c] in exhaustive or rng.random() < .5]
    labelled = [c for c in (1, 2) if tagged and rng.random() < .3]
    elements = [marked(rng, c, p) for c, p in kept if c not in labelled]
    tags = [element('tag', NAMES[c]) for c in {c for c, _ in found}]
    assume(elements or tagged)
    said = read('a.xml', cvat(elements + tags*tagged, (h, w)),
                dict(exhaustive=exhaustive, tight=tight, overlapping=overlapping))
    sets = said.class_sets((h, w), 3)
    assert_contains(sets, class_sets(torch.from_numpy(truth)), 3)
    assert_tight(sets.regions.numpy(), truth)
    smaller = said.sets_at((h, w), 3, ((h+1)//2, (w+1)//2))
    assert not (smaller.certain & ~smaller.possible).any()

@check(seeds, side, side)
def test_overlapping_masks_come_back(seed, h, w):
    truth = sets_of(seed, h, w, True)
    runs = [(c, {'counts': counted(truth >> c & 1 > 0, 'F'), 'size': [h, w]}) for c in (1, 2) if (truth >> c & 1).any()]
    mask = read('a.json', coco(runs, (h, w)), dict(exhaustive=True, overlapping=True))
    assert type(mask) is Mask and mask.bits and (mask.labels == truth).all()

@check(st.sets(st.integers(1, 2), min_size=1))
def test_labels_come_back(present):
    told = dict(exhaustive=True, images={'a': (4, 4)})
    exports = [cvat([element('tag', NAMES[c]) for c in present], (4, 4)),
               {**labelme([], (4, 4)), 'flags': {n: i in present for i, n in enumerate(NAMES) if i}},
               studio([('choices', NAMES[c], {}) for c in present], (4, 4))]
    for export in exports: assert read('a.json', export, told) == ImageLabels(sorted(present))

@check(seeds, side, side, st.integers(0, 10_000), st.sampled_from(['cvat masks', 'studio polygons', 'coco text', 'via json']))
def test_a_file_cut_off_is_an_error(seed, h, w, at, kind):
    name, export = MASKS[kind]
    content = export(labels_of(seed, h, w))
    text = content if isinstance(content, str) else json.dumps(content)
    with pytest.raises(ValueError, match=name): read(name, text[:at % (len(text)-1)], dict(images={'a': (h, w)}))

def test_without_simpleitk(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__('sys').modules, 'SimpleITK', None)
    (tmp_path/'a.seg.nrrd').write_bytes(b'NRRD0004\n')
    with pytest.raises(ImportError, match=r'mlds\[formats\]'): read_annotations(tmp_path/'a.seg.nrrd', NAMES)

def test_nothing_is_written(tmp_path):
    content = cvat([element('tag', NAMES[1])], (4, 4)).replace('x/a.png', '../../../etc/a.png')
    (tmp_path/'a.xml').write_text(content)
    (tmp_path/'images').mkdir()
    Image.new('L', (4, 4)).save(tmp_path/'images/a.png')
    before = sorted(tmp_path.rglob('*'))
    assert list(read_annotations(tmp_path, NAMES, images=tmp_path/'images')) == ['a']
    assert sorted(tmp_path.rglob('*')) == before


# in the folder annotations/ of a data folder

def data_folder(folder, labels, kind, volume=False):
    "Images a and b, or a volume of both, with an export of shapes of the first; both were looked at."
    sitk = pytest.importorskip('SimpleITK')
    for sub in ('images', 'annotations'): (folder/sub).mkdir(parents=True)
    images = np.stack([labels, labels[::-1]])*60 + np.uint8([[[0]], [[9]]])
    if volume: sitk.WriteImage(sitk.GetImageFromArray(images), str(folder/'images/a.nii.gz'))
    else: [Image.fromarray(i).save(folder/f'images/{name}.png') for i, name in zip(images, 'ab')]
    (folder/'labels.csv').write_text('id,group,kind\na,p,shapes\n' + 'b,q,\n'*(not volume))
    for file, names in (('classes', NAMES), ('looked_for', NAMES[1:])): (folder/f'{file}.txt').write_text('\n'.join(names))
    name, export = MASKS[kind]
    content = export(np.stack([labels, 0*labels]) if volume else labels)
    if callable(content): content(folder/'annotations'/name)
    else: (folder/'annotations'/name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder

@pytest.mark.parametrize('kind', MASKS)
def test_an_export_in_a_data_folder(tmp_path, kind):
    labels = random_labels(3, 14, 12, 3).numpy().astype(np.uint8)
    seen, bare = read_folder(data_folder(tmp_path/'data', labels, kind)).annotation
    assert (seen.read().numpy() == labels).all() and bare.kind == 'unlabelled'
    assert check_folder(tmp_path/'data').problems == []

def test_an_export_of_a_volume(tmp_path):
    labels = random_labels(3, 14, 12, 3).numpy().astype(np.uint8)
    shown, empty = read_folder(data_folder(tmp_path/'data', labels, 'slicer', volume=True)).annotation
    assert (shown.read().numpy() == labels).all() and not empty.read().any()
