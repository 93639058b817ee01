"""Image files of every format, depth and byte order against an independent reader; and files that are broken.

A format's case writes a small file and says which values must be read from it."""
import gzip
import re
import struct
import zlib

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from conftest import ROOT
from mlds.files import (IMAGE_SUFFIXES, find_image, image_size, image_slices, image_spacing, image_stem, read_image,
                        read_mask, write_mask)
from mlds.sources.chest import _SIGNS
from mlds.sources.tools import _READERS

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
COLOURS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
TURNED = (1, 0, 0, 0, 0, 1, 0, -1, 0)  # a coronal volume: its slices are not axial

def values(kind, shape=(20, 30)):
    "Values that use the whole range of a number type."
    kind = np.dtype(kind)
    if kind.kind == 'f': return RNG.normal(0, 1e3, shape).astype(kind)
    limits = np.iinfo(kind)
    return RNG.integers(limits.min, limits.max, shape, endpoint=True, dtype=kind.newbyteorder('=')).astype(kind)

def same(read, stored): return np.array_equal(read, np.asarray(stored).astype(np.float32))


# PNG, JPEG, BMP and the like

@pytest.mark.parametrize('suffix', ['.png', '.bmp', '.gif', '.tif', '.PNG'])
def test_grey_of_eight_bits(tmp_path, suffix):
    file = tmp_path/f'a{suffix}'
    Image.fromarray(BYTES).save(file)
    assert same(read_image(file), BYTES) and same(read_image(file, channels=3), np.dstack([BYTES]*3))
    Image.fromarray(BYTES % 62).save(file)
    if suffix != '.gif': assert np.array_equal(read_mask(file), BYTES % 62)  # GIF stores places in a palette
    assert (image_size(file), image_slices(file), image_spacing(file)) == ((20, 30), 1, None)

def test_jpeg_is_what_it_was_up_to_its_compression(tmp_path):
    smooth = np.add.outer(np.arange(40), 3*np.arange(60)).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path/'a.jpg', quality=95)
    assert abs(read_image(tmp_path/'a.jpg') - smooth).max() < 8

@pytest.mark.parametrize('suffix', ['.png', '.bmp', '.tif', '.webp'])
def test_colours(tmp_path, suffix):
    file = tmp_path/f'a{suffix}'
    Image.fromarray(COLOURS).save(file, **dict(lossless=True) if suffix == '.webp' else {})
    assert same(read_image(file, channels=3), COLOURS)
    with pytest.raises(ValueError, match='in colour: convert it to grey, or say channels=3'): read_image(file)

def test_opacity_is_dropped_and_palettes_are_looked_up(tmp_path):
    Image.fromarray(np.dstack([COLOURS, BYTES])).save(tmp_path/'a.png')
    assert same(read_image(tmp_path/'a.png', channels=3), COLOURS)
    ids = BYTES % 3
    palette = Image.fromarray(ids).convert('P')
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    for name in ('p.png', 'p.tif'):
        palette.save(tmp_path/name)
        assert np.array_equal(read_mask(tmp_path/name), ids)
        assert same(read_image(tmp_path/name, channels=3)[..., 0], 255*(ids == 1))

def test_a_photograph_on_its_side_is_refused(tmp_path):
    for turn in (1, 6):
        exif = Image.Exif()
        exif[274] = turn
        save(tmp_path/f'{turn}.jpg', BYTES, exif=exif)
    assert read_image(tmp_path/'1.jpg').shape == (20, 30)
    with pytest.raises(ValueError, match='6.jpg .* EXIF orientation 6: save it upright'): read_image(tmp_path/'6.jpg')

def test_png_of_sixteen_bits(tmp_path):
    deep = values('uint16')
    Image.fromarray(deep).save(tmp_path/'a.png')
    assert same(read_image(tmp_path/'a.png'), deep) and np.array_equal(read_mask(tmp_path/'a.png'), deep)
    assert same(read_image(tmp_path/'a.png', channels=3)[..., 2], deep)


# TIFF

KINDS = 'uint8 int8 uint16 int16 uint32 int32 float16 float32 float64'.split()

@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('kind', KINDS)
def test_tiff_depth_and_byte_order(tmp_path, kind, order):
    pixels = values(kind)
    tifffile.imwrite(tmp_path/'a.tif', pixels, byteorder=order)
    assert same(read_image(tmp_path/'a.tif'), pixels)
    if np.dtype(kind).kind != 'f' and kind != 'uint8': assert np.array_equal(read_mask(tmp_path/'a.tif'), pixels)

@pytest.mark.parametrize('compression', [None, 'zlib'])
@pytest.mark.parametrize('planes', ['contig', 'separate'])
@pytest.mark.parametrize('channels', [2, 3, 4, 5])
def test_tiff_channels(tmp_path, channels, planes, compression):
    pixels = values('uint16', (20, 30, channels))
    stored = pixels if planes == 'contig' else np.moveaxis(pixels, -1, 0)
    tifffile.imwrite(tmp_path/'a.tif', stored, planarconfig=planes, compression=compression,
                     photometric='rgb' if channels in (3, 4) else 'minisblack')
    assert same(read_image(tmp_path/'a.tif', channels=channels), pixels)
    other = 2 if channels != 2 else 5
    with pytest.raises(ValueError, match=f'has {channels} channels where {other}'):
        read_image(tmp_path/'a.tif', channels=other)

@pytest.mark.parametrize('compression', ['tiff_lzw', 'packbits', 'tiff_adobe_deflate', None])
@pytest.mark.parametrize('kind', ['uint8', 'uint16'])
def test_tiff_compression(tmp_path, kind, compression):
    pixels = values(kind)
    Image.fromarray(pixels).save(tmp_path/'a.tif', compression=compression)
    assert same(read_image(tmp_path/'a.tif'), pixels)

@pytest.mark.parametrize('compression', [None, 'zlib'])
@pytest.mark.parametrize('kind', ['uint8', 'uint16'])
def test_tiff_in_which_zero_is_white(tmp_path, kind, compression):
    pixels = values(kind)
    tifffile.imwrite(tmp_path/'a.tif', pixels, photometric='miniswhite', compression=compression)
    assert same(read_image(tmp_path/'a.tif'), np.iinfo(kind).max - pixels)

@pytest.mark.parametrize('photometric', [0, 1])
@pytest.mark.parametrize('compression', [None, 'tiff_lzw', 'group4'])
def test_tiff_written_by_pillow(tmp_path, compression, photometric):
    "What was white is white again, and 1 in a mask of one bit, however it is stored."
    white = BYTES > 127
    Image.fromarray(white).save(tmp_path/'a.tif', compression=compression, tiffinfo={262: photometric})
    assert same(read_image(tmp_path/'a.tif'), 255*white) and np.array_equal(read_mask(tmp_path/'a.tif'), white)
    if compression == 'group4': return
    Image.fromarray(BYTES).save(tmp_path/'b.tif', compression=compression, tiffinfo={262: photometric})
    assert same(read_image(tmp_path/'b.tif'), BYTES)

def test_tiff_of_several_pages(tmp_path):
    pages = values('uint16', (4, 20, 30))
    tifffile.imwrite(tmp_path/'a.tif', pages, photometric='minisblack')
    assert image_slices(tmp_path/'a.tif') == 4
    for k in range(4): assert same(read_image(tmp_path/'a.tif', slice=k), pages[k])
    assert np.array_equal(read_mask(tmp_path/'a.tif', slice=np.int64(2)), pages[2])
    for reader in (read_image, read_mask):
        with pytest.raises(ValueError, match='holds 4 pages: name one with slice=0 to slice=3'):
            reader(tmp_path/'a.tif')
        for k in (-1, 4, 'two'):
            with pytest.raises(ValueError, match=f'no slice {k}: its pages are numbered from 0 to 3'):
                reader(tmp_path/'a.tif', slice=k)

def test_animation(tmp_path):
    pages = [Image.fromarray(BYTES), Image.fromarray(255-BYTES)]
    pages[0].save(tmp_path/'a.gif', save_all=True, append_images=pages[1:])
    assert same(read_image(tmp_path/'a.gif', slice=1), 255-BYTES)


# NIfTI, MetaImage, NRRD

VOLUMES = '.nii .nii.gz .mhd .mha .nrrd .nhdr'.split()

def volume_file(path, pixels, spacing=(.25, .5, 3), vector=False):
    image = sitk.GetImageFromArray(pixels, isVector=vector)
    if image.GetDimension() == 3: image.SetDirection(TURNED)
    image.SetSpacing(spacing[:image.GetDimension()])
    image.SetOrigin((5, 7, 9, 0)[:image.GetDimension()])
    sitk.WriteImage(image, path)
    return path

@pytest.mark.parametrize('kind', ['uint8', 'int16', 'uint16', 'int32', 'float32', 'float64'])
@pytest.mark.parametrize('suffix', VOLUMES)
def test_volumes(tmp_path, suffix, kind):
    pixels = values(kind, (5, 20, 30))
    file = volume_file(tmp_path/f'v{suffix}', pixels)
    assert (image_size(file), image_slices(file), image_spacing(file)) == ((20, 30), 5, (.5, .25))
    for k in (0, 3, 4): assert same(read_image(file, slice=k), pixels[k])
    with pytest.raises(ValueError, match='holds 5 slices: name one with slice=0 to slice=4'): read_image(file)
    if np.dtype(kind).kind != 'f' and kind != 'uint8': assert np.array_equal(read_mask(file, slice=4), pixels[4])

@pytest.mark.parametrize('shape', [(20, 30), (1, 20, 30)])
@pytest.mark.parametrize('suffix', VOLUMES)
def test_one_slice_needs_no_name(tmp_path, suffix, shape):
    pixels = values('int16', shape)
    file = volume_file(tmp_path/f'v{suffix}', pixels)
    assert same(read_image(file), pixels.reshape(20, 30)) and same(read_image(file, slice=0), pixels.reshape(20, 30))

@pytest.mark.parametrize('suffix', VOLUMES)
def test_colour_volumes(tmp_path, suffix):
    pixels = values('uint8', (2, 20, 30, 3))
    file = volume_file(tmp_path/f'v{suffix}', pixels, vector=True)
    assert same(read_image(file, channels=3, slice=1), pixels[1])
    with pytest.raises(ValueError, match='in colour'): read_image(file, slice=1)

@pytest.mark.parametrize('order', '<>')
def test_nifti_of_another_writer(tmp_path, order):
    nib = pytest.importorskip('nibabel')
    pixels = values('int16', (30, 20, 5))
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(np.dtype('int16').newbyteorder(order))
    image = nib.Nifti1Image(pixels, np.diag([.25, .5, 3, 1]), header)
    image.header.set_xyzt_units('mm')
    nib.save(image, tmp_path/'a.nii.gz')
    assert same(read_image(tmp_path/'a.nii.gz', slice=2), pixels[..., 2].T)
    assert image_spacing(tmp_path/'a.nii.gz') == (.5, .25)

def test_nrrd_of_another_writer(tmp_path):
    nrrd = pytest.importorskip('nrrd')
    pixels = values('uint16', (30, 20, 5))
    nrrd.write(str(tmp_path/'a.nrrd'), pixels, dict(encoding='gzip'))
    assert same(read_image(tmp_path/'a.nrrd', slice=2), pixels[..., 2].T)
    assert image_spacing(tmp_path/'a.nrrd') is None

@pytest.mark.parametrize('unit,spacing', [('mm', (1, 1)), ('unknown', None)])
def test_a_spacing_of_one_is_believed_if_it_is_stated(tmp_path, unit, spacing):
    nib = pytest.importorskip('nibabel')
    image = nib.Nifti1Image(values('int16', (30, 20, 5)), np.eye(4))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path/'a.nii')
    assert image_spacing(tmp_path/'a.nii') == spacing

def test_raw_file_of_big_endian_numbers(tmp_path):
    pixels = values('>i2', (5, 20, 30))
    (tmp_path/'v.raw').write_bytes(pixels.tobytes())
    (tmp_path/'v.mhd').write_text('ObjectType = Image\nNDims = 3\nDimSize = 30 20 5\nElementType = MET_SHORT\n'
        'BinaryDataByteOrderMSB = True\nElementDataFile = v.raw\n')
    assert same(read_image(tmp_path/'v.mhd', slice=3), pixels[3])
    assert image_spacing(tmp_path/'v.mhd') is None


@pytest.mark.parametrize('suffix', ['.nii.gz', '.mha', '.nrrd'])
def test_a_volume_of_almost_nothing_but_zeros_is_no_bomb(tmp_path, suffix):
    pixels = np.zeros((40, 400, 400), np.uint8)
    pixels[7, 8, 9] = 1
    image = sitk.GetImageFromArray(pixels)
    sitk.WriteImage(image, tmp_path/f'a{suffix}', useCompression=True, compressionLevel=9)
    assert same(read_image(tmp_path/f'a{suffix}', slice=7), pixels[7])

# DICOM, written with pydicom, whose own functions say what a viewer shows

def dicom_file(path, pixels, photometric='MONOCHROME2', bits=None, **tags):
    pydicom = pytest.importorskip('pydicom')
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b'\0'*128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    colour = photometric == 'RGB'
    if pixels.ndim == 3 and not colour: ds.NumberOfFrames = len(pixels)
    ds.Rows, ds.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 3 if colour else 1, photometric
    if colour: ds.PlanarConfiguration = 0
    ds.BitsAllocated = 8*pixels.dtype.itemsize
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == 'i')
    for name, value in tags.items(): setattr(ds, name, value)
    ds.PixelData = pixels.tobytes()
    ds.save_as(path, enforce_file_format=True)
    return path

def viewed(path):
    "What pydicom makes of a file, with MONOCHROME1 turned the right way round."
    from pydicom import dcmread
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    ds = dcmread(path)
    shown = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds).astype(float), ds)
    return -shown if ds.PhotometricInterpretation == 'MONOCHROME1' else shown

CT, WINDOW = dict(RescaleSlope=2, RescaleIntercept=-1024), dict(WindowCenter=400, WindowWidth=1000)
DICOMS = {
    'plain': lambda centre, width: {},
    'rescale': lambda centre, width: CT,
    'window': lambda centre, width: dict(WindowCenter=centre, WindowWidth=width),
    'rescale and window': lambda centre, width: CT | dict(WindowCenter=2*centre-1024, WindowWidth=2*width),
    'two windows': lambda centre, width: dict(WindowCenter=[centre, 0], WindowWidth=[width, 2]),
    'exact window': lambda centre, width: dict(WindowCenter=centre, WindowWidth=width, VOILUTFunction='LINEAR_EXACT'),
    'decimals': lambda centre, width: dict(RescaleSlope='0.25', RescaleIntercept='-10.5',
                                           WindowCenter=f'{centre/4-10.5:g}', WindowWidth=f'{width/4:g}'),
}

@pytest.mark.parametrize('kind,bits', [('uint8', 8), ('uint16', 12), ('uint16', 16), ('int16', 16), ('int16', 12)])
@pytest.mark.parametrize('photometric', ['MONOCHROME1', 'MONOCHROME2'])
@pytest.mark.parametrize('case', DICOMS)
def test_dicom(tmp_path, case, photometric, kind, bits):
    "A window of a quarter of the range, below its middle, so that turning it round matters."
    low, high = (-2**(bits-1), 2**(bits-1)) if kind == 'int16' else (0, 2**bits)
    pixels = RNG.integers(low, high, (20, 30)).astype(kind)
    tags = DICOMS[case](low + 3*(high-low)//8, (high-low)//4)
    file = dicom_file(tmp_path/'a.dcm', pixels, photometric, bits, **tags)
    if (photometric, kind, bits) == ('MONOCHROME1', 'int16', 12):  # SimpleITK cannot turn these round
        with pytest.raises(ValueError, match='cannot be read'): read_image(file)
        return
    read, expected = read_image(file).astype(float), viewed(file)
    slope, offset = np.polyfit(read.ravel(), expected.ravel(), 1)  # a viewer's units are its own
    assert slope > 0
    assert abs(slope*read + offset - expected).max() < 1e-4*np.ptp(expected)

def test_dicom_values_keep_their_unit(tmp_path):
    pixels = np.arange(600, dtype=np.int16).reshape(20, 30)
    file = dicom_file(tmp_path/'a', pixels, PixelSpacing=[.5, .25], **CT | WINDOW)  # no suffix
    assert same(read_image(file, window=False), 2.*pixels - 1024)
    assert same(read_image(file), np.clip(2.*pixels - 1024, -100, 899))
    assert image_spacing(file) == (.5, .25)
    assert np.array_equal(read_mask(file), 2*pixels - 1024)

def test_dicom_of_several_frames_and_colours(tmp_path):
    frames = values('uint16', (3, 20, 30))
    file = dicom_file(tmp_path/'a.dcm', frames)
    assert (image_slices(file), image_spacing(file)) == (3, None)
    assert same(read_image(file, slice=2), frames[2])
    with pytest.raises(ValueError, match='holds 3 slices'): read_image(file)
    from pydicom import dcmread
    packed = dcmread(file)
    packed.compress('1.2.840.10008.1.2.5')  # RLE lossless
    packed.save_as(tmp_path/'c.dcm')
    assert same(read_image(tmp_path/'c.dcm', slice=1), frames[1])
    file = dicom_file(tmp_path/'b.dcm', COLOURS, 'RGB')
    assert same(read_image(file, channels=3), COLOURS)


# Masks in the format of their image

@pytest.mark.parametrize('suffix,written', [('.nii', '.nii'), ('.nii.gz', '.nii.gz'), ('.mhd', '.mha'),
    ('.mha', '.mha'), ('.nrrd', '.nrrd'), ('.nhdr', '.nrrd')])
@pytest.mark.parametrize('overlapping', [False, True])
def test_mask_has_the_geometry_of_its_image(tmp_path, suffix, written, overlapping):
    image = volume_file(tmp_path/f'v{suffix}', values('int16', (5, 20, 30)))
    mask = RNG.integers(1, 9000 if overlapping else 4, (5, 20, 30))
    file = write_mask(mask, tmp_path/'mask', overlapping, like=image)
    assert file == tmp_path/f'mask{written}'
    for k in range(5): assert np.array_equal(read_mask(file, slice=k), mask[k])
    a, b = (sitk.ReadImage(str(f)) for f in (image, file))
    for of in ('GetSize', 'GetSpacing', 'GetOrigin', 'GetDirection'):
        assert np.allclose(getattr(a, of)(), getattr(b, of)(), atol=1e-6), of
    if 'nii' in suffix:
        nib = pytest.importorskip('nibabel')
        assert np.allclose(nib.load(image).affine, nib.load(file).affine, atol=1e-5)
    assert not list(tmp_path.glob('.*'))

def test_mask_of_other_formats(tmp_path):
    dicom = dicom_file(tmp_path/'a.dcm', values('uint16'), PixelSpacing=[.5, .25])
    file = write_mask(BYTES % 3, tmp_path/'m', like=dicom)
    assert file.name == 'm.nrrd' and image_spacing(file) == (.5, .25)
    assert np.array_equal(read_mask(file), BYTES % 3)
    Image.fromarray(BYTES).save(tmp_path/'a.jpg')
    assert write_mask(BYTES % 3, tmp_path/'m.jpg', like=tmp_path/'a.jpg').name == 'm.png'
    pages = RNG.integers(0, 4, (4, 20, 30))
    tifffile.imwrite(tmp_path/'a.tif', pages.astype(np.uint16), photometric='minisblack')
    file = write_mask(pages, tmp_path/'m', like=tmp_path/'a.tif')
    assert file.name == 'm.tif' and np.array_equal(read_mask(file, slice=3), pages[3])
    for wrong in (pages[:3], pages[0], pages.transpose(0, 2, 1)):
        with pytest.raises(ValueError, match='give a mask for every slice'):
            write_mask(wrong, tmp_path/'m', like=tmp_path/'a.tif')


# Broken files

def half(file): file.write_bytes(file.read_bytes()[:file.stat().st_size//2])
def save(file, pixels, **kwargs): Image.fromarray(pixels).save(file, **kwargs)

def huge_png(file):
    save(file, BYTES)
    content = bytearray(file.read_bytes())
    content[16:24] = struct.pack('>II', 200_000, 200_000)
    content[29:33] = struct.pack('>I', zlib.crc32(content[12:29]))
    file.write_bytes(content)
def huge_tiff(file):
    tifffile.imwrite(file, BYTES)
    with tifffile.TiffFile(file, mode='r+') as t:
        for tag in ('ImageWidth', 'ImageLength'): t.pages[0].tags[tag].overwrite(60_000)
def huge_nrrd(file):
    file.write_text('NRRD0004\ntype: uint8\ndimension: 3\nsizes: 100000 100000 1000\nencoding: raw\n\n')
def hollow_nrrd(file):
    "Sixteen gigabytes in a hundred bytes."
    header = b'NRRD0004\ntype: double\ndimension: 3\nsizes: 1024 1024 2000\nendian: little\nencoding: gzip\n\n'
    file.write_bytes(header + gzip.compress(bytes(1000)))
def huge_nifti(file):
    volume_file(file.with_name('b.nii'), values('uint8', (5, 20, 30)))
    content = bytearray(file.with_name('b.nii').read_bytes())
    content[42:48] = struct.pack('<3h', 30_000, 30_000, 30_000)
    file.write_bytes(gzip.compress(content))
def bomb(file):
    "A hundred megabytes of zeros in an image of 20x30."
    tifffile.imwrite(file, iter([zlib.compress(bytes(10**8))]), shape=(20, 30), dtype='uint8', compression='zlib',
                     photometric='minisblack', rowsperstrip=20)
def half_volume(file):
    volume_file(file, values('int16', (5, 20, 30)))
    half(file)

BROKEN = {
    'half a PNG': ('a.png', lambda f: (save(f, BYTES), half(f)), 'cannot be read'),
    'half a JPEG': ('a.jpg', lambda f: (save(f, BYTES), half(f)), 'cannot be read'),
    'half a BMP': ('a.bmp', lambda f: (save(f, BYTES), half(f)), 'cannot be read'),
    'half a TIFF': ('a.tif', lambda f: (tifffile.imwrite(f, BYTES), half(f)), 'cannot be read'),
    'half a zipped TIFF': ('a.tif', lambda f: (tifffile.imwrite(f, BYTES, compression='zlib'), half(f)),
                           'cannot be read'),
    'half an LZW TIFF': ('a.tif', lambda f: (save(f, BYTES, compression='tiff_lzw'), half(f)), 'cannot be read'),
    'half a NIfTI': ('a.nii', half_volume, 'cannot be read'),
    'half a zipped NIfTI': ('a.nii.gz', half_volume, 'cannot be read'),
    'half a MetaImage': ('a.mha', half_volume, 'data are missing, cut off'),
    'half an NRRD': ('a.nrrd', half_volume, 'data are missing, cut off'),
    'half a DICOM': ('a.dcm', lambda f: (dicom_file(f, values('uint16', (5, 20, 30))), half(f)), 'cannot be read'),
    'MHD without its data': ('a.mhd', lambda f: (volume_file(f, values('int16', (5, 20, 30))),
                                                 f.with_suffix('.raw').unlink()), 'data are missing'),
    'half a raw file': ('a.mhd', lambda f: (volume_file(f, values('int16', (5, 20, 30))),
                                            half(f.with_suffix('.raw'))), 'cut off'),
    'several volumes': ('a.nii', lambda f: volume_file(f, values('int16', (2, 2, 20, 30)), (1, 1, 1, 1)),
                        'save each as a file of its own'),
    'huge PNG': ('a.png', huge_png, 'exceeds limit'),
    'huge TIFF': ('a.tif', huge_tiff, 'too large to be true'),
    'TIFF that is a bomb': ('a.tif', bomb, 'more data than its header'),
    'huge NRRD': ('a.nrrd', huge_nrrd, 'too large to be true'),
    'hollow NRRD': ('a.nrrd', hollow_nrrd, 'too large to be true'),
    'huge NIfTI': ('a.nii.gz', huge_nifti, 'too large to be true'),
    **{f'text as {s}': (f'a{s}', lambda f: f.write_text('see mail'), 'cannot be read') for s in IMAGE_SUFFIXES},
    **{f'empty {s}': (f'a{s}', lambda f: f.write_bytes(b''), 'cannot be read') for s in IMAGE_SUFFIXES},
    'folder': ('a.png', lambda f: f.mkdir(), 'cannot be read'),
}

@pytest.mark.parametrize('case', BROKEN)
def test_broken_files(tmp_path, case):
    name, spoil, words = BROKEN[case]
    spoil(tmp_path/name)
    last = 4 if case.startswith('half') and name[1:] in VOLUMES + ['.dcm'] else 0
    for read in (read_image, read_mask):
        if case == 'half a JPEG' and read is read_mask: continue  # refused before it is read
        with pytest.raises(ValueError) as e: read(tmp_path/name, slice=last)
        message = str(e.value)
        assert f'{tmp_path/name} cannot be read' in message and words in message and 'replace' in message
        assert message.count('\n') == 0 and len(message) < 600

MASKS = {
    'soft edges': ('m.png', lambda f: save(f, np.uint8([[0, 0, 128, 255]])), r'soft edges \(128 .*save \(mask > 127\)'),
    'decimals': ('m.tif', lambda f: tifffile.imwrite(f, np.zeros((4, 4), np.float32)), 'whole numbers'),
    'decimals in NIfTI': ('m.nii', lambda f: volume_file(f, values('float32')), 'whole numbers'),
    'JPEG': ('m.jpg', lambda f: save(f, BYTES), 'JPEG file, .* export it as PNG'),
    'JPEG called PNG': ('m.png', lambda f: save(f, BYTES, format='JPEG'), 'JPEG file, .* export it as PNG'),
    'JPEG inside TIFF': ('m.tif', lambda f: save(f, BYTES, compression='jpeg'), 'JPEG'),
    'colours': ('m.png', lambda f: save(f, COLOURS), 'has 3 channels: store class ids in one'),
}

@pytest.mark.parametrize('case', MASKS)
def test_masks_that_are_none(tmp_path, case):
    name, write, words = MASKS[case]
    write(tmp_path/name)
    with pytest.raises(ValueError, match=words) as e: read_mask(tmp_path/name)
    assert str(tmp_path/name) in str(e.value)

@pytest.mark.parametrize('ids', [[0, 255], [0, 1, 2, 61, 255], [62, 130, 255], [0, 254]])
def test_masks_without_soft_edges(tmp_path, ids):
    "Black and white, unknown pixels as 255, and class sets in 8 bits, which are never 0."
    save(tmp_path/'m.png', np.uint8([ids]))
    assert np.array_equal(read_mask(tmp_path/'m.png'), [ids])

@pytest.mark.parametrize('suffix', ['.png', '.tif', '.nii', '.mha', '.nrrd'])
def test_constant_and_nan_images(tmp_path, suffix):
    def write(pixels): (tifffile.imwrite if suffix == '.tif' else volume_file)(tmp_path/f'a{suffix}', pixels)
    if suffix == '.png': save(tmp_path/'a.png', np.full((4, 4), 7, np.uint8))
    else: write(np.full((4, 4), 7, np.float32))
    with pytest.raises(ValueError, match=rf'a\{suffix} is constant \(7 everywhere\): remove it'):
        read_image(tmp_path/f'a{suffix}')
    if suffix == '.png': return
    write(np.float32([[1, np.nan], [0, 3]]))
    if suffix == '.nii': # NIfTI's own library reads NaN, which some programs write outside of the head, as 0
        assert same(read_image(tmp_path/'a.nii'), [[1, 0], [0, 3]])
        return
    with pytest.raises(ValueError, match=rf'a\{suffix} holds NaN'): read_image(tmp_path/f'a{suffix}')


# Files by their stem

@pytest.mark.parametrize('suffix', IMAGE_SUFFIXES)
def test_found_by_stem(tmp_path, suffix):
    (tmp_path/'p 1').mkdir()
    for name in (f'scan.1{suffix}', f'scan.1{suffix.upper()}', f'[x]{suffix}'):
        file = tmp_path/'p 1'/name
        file.touch()
        assert find_image(tmp_path, f'p 1/{image_stem(name)}') == file
        assert image_stem(file) == name[:-len(suffix)]
        file.unlink()

def test_found_twice_or_never(tmp_path):
    for name in ('a.png', 'a.nii.gz', 'b.xcf', 'aa.png'): (tmp_path/name).touch()
    with pytest.raises(ValueError, match='mask .*a exists as a.png and a.nii.gz: keep one of them'):
        find_image(tmp_path, 'a', 'mask')
    with pytest.raises(FileNotFoundError, match=r'b does not exist in any known format \(.png .*; b.xcf is none'):
        find_image(tmp_path, 'b')
    assert find_image(tmp_path, 'aa') == tmp_path/'aa.png'

def test_never_out_of_the_folder(tmp_path):
    folder, outside = tmp_path/'data', tmp_path/'other'
    for f in (folder, outside): f.mkdir()
    (outside/'a.png').touch()
    (folder/'link.png').symlink_to(outside/'a.png')
    (folder/'sub').symlink_to(outside)
    for stem in ('../other/a', str(outside/'a'), 'sub/a', 'link', '../nowhere'):
        with pytest.raises(ValueError, match='leads out of .* copy the file into the folder'): find_image(folder, stem)
    assert find_image(folder/'sub', 'a').samefile(outside/'a.png')  # the folder itself may be a link
    (folder/'b.png').touch()
    (folder/'same.png').symlink_to('b.png')
    assert find_image(folder, 'same').name == 'same.png'

def test_without_simpleitk(tmp_path, monkeypatch):
    file = volume_file(tmp_path/'a.nii', values('int16', (5, 20, 30)))
    monkeypatch.setitem(__import__('sys').modules, 'SimpleITK', None)
    with pytest.raises(ImportError, match=r'a.nii .*mlds\[formats\]'): read_image(file, slice=1)


def test_the_page_on_formats_names_them_all():
    "Every suffix, tool and data set, each with a test that there is."
    page = (ROOT/'nbs/howto/formats.ipynb').read_text()
    wanted = [f'`{s}`' for s in IMAGE_SUFFIXES] + [f'`{read.__name__}`' for read in _SIGNS.values()]
    assert not [word for word in wanted if word not in page]
    assert not [tool for tool in _READERS if f'{tool} |' not in page.lower().replace('label studio', 'labelstudio')]
    tests = re.findall(r'(test_\w+\.py)::(\w+)', page)
    assert len(tests) > 20 and not [t for f, t in tests if f'def {t}(' not in (ROOT/'tests'/f).read_text()]
