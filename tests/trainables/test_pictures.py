"""python -m pytest tests/trainables/test_pictures.py"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from analysis import theme
from tests.synthetic import ellipsoid
from trainables import pictures
from trainables.pictures import (
    GAP,
    HEAT,
    PLANES,
    class_colour,
    middle_slice,
    plane,
    save_masks,
    save_reconstruction,
    save_reconstruction_slices,
    save_segmentation,
    save_segmentation_slices,
)


def read(path, mode="RGB"):
    picture = Image.open(path)
    assert picture.format == "PNG" and picture.mode == mode
    return np.asarray(picture)


def frames_of(path, mode="RGB"):
    """The frames of a sheet, and what is noted of it."""
    about = json.loads((path.parent / "slices.json").read_text())[path.name]
    sheet = read(path, mode)
    assert sheet.shape[0] == about["frames"] * sum(about["heights"])
    return sheet.reshape(about["frames"], sum(about["heights"]), *sheet.shape[1:]), about


def test_a_reconstruction_shows_image_hidden_regions_and_pasted_prediction(tmp_path):
    images = torch.full((2, 1, 128, 128), 0.2)
    hidden = torch.zeros(2, 128, 128, dtype=torch.bool)
    hidden[:, :64] = True
    path = tmp_path / "pictures" / "reconstruction.png"
    save_reconstruction(path, images, hidden, torch.full_like(images, 1.7))
    grid = read(path)
    assert grid.shape == (2 * 128 + GAP, 3 * 128 + 2 * GAP, 3)
    top, bottom = grid[0], grid[127]
    columns = [0, 128 + GAP, 2 * (128 + GAP)]
    assert [top[x].tolist() for x in columns] == [[51] * 3, [128] * 3, [255] * 3]
    assert [bottom[x].tolist() for x in columns] == [[51] * 3] * 3
    assert (grid[128 : 128 + GAP] == 255).all()
    assert [entry.name for entry in path.parent.iterdir()] == ["reconstruction.png"]


def test_a_segmentation_shows_fixed_colours_over_the_dimmed_image(tmp_path):
    images = torch.full((1, 3, 2, 4), 0.4)
    truth = torch.tensor([[[0, 1, 2, 255], [0, 0, 0, 0]]])
    save_segmentation(tmp_path / "s.png", images, truth, torch.zeros_like(truth))
    grid = read(tmp_path / "s.png")
    assert grid.shape == (128, 3 * 256 + 2 * GAP, 3)  # enlarged 64 times
    shown = [grid[0, 256 + GAP + 64 * x].tolist() for x in range(4)]
    assert shown == [[51] * 3, list(class_colour(1)), list(class_colour(2)), [160] * 3]
    assert (grid[:, 2 * (256 + GAP) :] == 51).all()


def test_of_volumes_the_middle_axial_plane_is_drawn(tmp_path):
    """Front (high y) is at the top, the patient's right (high x) on the left."""
    images = torch.zeros(1, 1, 160, 128, 3)
    images[..., 1] = 0.2
    images[:, :, :80, :, 1] = 0.4  # the patient's left half
    hidden = torch.zeros(1, 160, 128, 3, dtype=torch.bool)
    hidden[:, :, 64:, 1] = True  # in front
    labels = torch.full((1, 160, 128, 3), 255)
    labels[..., 1] = 1
    save_reconstruction(tmp_path / "r.png", images, hidden, torch.ones_like(images))
    save_segmentation(tmp_path / "s.png", images, labels, labels)
    save_masks(tmp_path / "m.png", images, hidden, hidden.float(), labels)
    left, middle = 0, 160 + GAP
    grid = read(tmp_path / "r.png")
    assert grid.shape == (128, 3 * 160 + 2 * GAP, 3)
    assert [grid[0, x, 0] for x in (left, 79, 80, 159)] == [51, 51, 102, 102]
    assert [grid[0, x, 0] for x in (left, middle, 2 * middle)] == [51, 128, 255]
    assert [grid[127, x, 0] for x in (left, middle, 2 * middle)] == [51, 51, 51]
    assert read(tmp_path / "s.png")[0, middle].tolist() == list(class_colour(1))
    drawn = read(tmp_path / "m.png")
    assert drawn[0, middle].tolist() == list(class_colour(1))
    assert [drawn[y, 2 * middle, 0] for y in (0, 127)] == [128, 51]


def test_planes_are_turned_as_radiologists_look_at_them():
    """Of a voxel 1 to the right, 2 to the front and 3 up the number is 123."""
    x, y, z = np.meshgrid(range(2), range(3), range(4), indexing="ij")
    volume = torch.from_numpy(100 * x + 10 * y + z)
    axial = [[121, 21], [111, 11], [101, 1]]
    assert plane(volume, PLANES["axial"], 1).tolist() == axial
    assert plane(volume, PLANES["coronal"], 1).tolist() == [
        [113, 13],
        [112, 12],
        [111, 11],
        [110, 10],
    ]
    assert plane(volume, PLANES["sagittal"], 0).tolist() == [
        [23, 13, 3],
        [22, 12, 2],
        [21, 11, 1],
        [20, 10, 0],
    ]
    assert middle_slice(volume[None, None])[0, 0].tolist() == [
        [value + 1 for value in line] for line in axial
    ]


def test_a_sheet_shows_all_planes_at_the_same_relative_depth(tmp_path):
    """One bright voxel at the upper end of every axis, 4 pixels wide: it is in the last frames."""
    images = torch.zeros(1, 1, 16, 32, 16)
    images[..., 15, 31, 15] = 1.0
    hidden = torch.zeros(1, 16, 32, 16, dtype=torch.bool)
    hidden[:, :8] = True  # the patient's left half
    path = tmp_path / "pictures" / "reconstruction-slices.png"
    save_reconstruction_slices(path, images, hidden, torch.full_like(images, 0.4), (2.0, 2.0, 2.0))
    frames, about = frames_of(path, "L")
    assert about == {
        "frames": 24,
        "planes": ["sagittal", "coronal", "axial"],
        "heights": [64 + GAP, 64 + GAP, 128 + GAP],
        "columns": ["image", "hidden (grey)", "reconstructed"],
        "shape": [16, 32, 16],
        "spacing": [2.0, 2.0, 2.0],
    }
    assert frames.shape == (24, 256 + 3 * GAP, 3 * (128 + GAP))
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, "slices.json"]

    seen = np.argwhere(frames[:, :, : 128 + GAP] == 255)
    # 23.5 of 24: voxel 15 of 16, 31 of 32, 15 of 16; in frame 22 the coronal plane is 30 of 32
    corners = {22: [(2, 2), (2 + 136, 34)], 23: [(2, 2), (2 + 68, 34), (2 + 136, 34)]}
    expected = [
        (frame, top + y, left + x)
        for frame, places in corners.items()
        for top, left in places
        for y in range(4)
        for x in range(4)
    ]
    assert sorted(map(tuple, seen.tolist())) == sorted(expected)

    # the left half: whole sagittal planes of the first frames, the right of the other pictures
    sagittal, axial = slice(2, 66), slice(138, 266)
    hidden_at, pasted_at = 132 + 2, 264 + 2
    assert (frames[11, sagittal, hidden_at : hidden_at + 128] == 128).all()
    assert (frames[12, sagittal, hidden_at : hidden_at + 128] == 0).all()
    for frame in (0, 23):
        assert (frames[frame, axial, 264 + 34 + 32 : 264 + 34 + 64] == 102).all()
        assert frames[frame, 200, 264 + 34 : 264 + 34 + 32].max() == 0
    assert (frames[11, sagittal, pasted_at : pasted_at + 128] == 102).all()


@pytest.mark.parametrize(
    ("shape", "spacing", "extents"),
    [
        ((32, 32, 8), (1.0, 1.0, 4.0), (128, 128, 128)),
        ((32, 64, 16), (1.0, 0.5, 2.0), (128, 128, 128)),
        ((30, 20, 10), (1.0, 1.0, 1.0), (120, 80, 40)),  # 4 pixels a voxel, not 4.27
        ((256, 128, 64), (0.5, 1.0, 1.5), (128, 128, 96)),
        ((240, 240, 155), (1.0, 1.0, 1.0), (128, 128, 83)),  # 155 * 128 / 240 = 82.7
    ],
)
def test_a_mm_is_as_long_in_every_direction(tmp_path, shape, spacing, extents):
    image, labels = torch.ones(1, *shape), np.zeros(shape, np.uint8)
    save_segmentation_slices(tmp_path / "s.png", image, labels, labels, spacing)
    frames, about = frames_of(tmp_path / "s.png", "L")
    right, front, up = extents
    width = about["heights"][0] and frames.shape[2] // 3
    top = 0
    for height, edges in zip(
        about["heights"], [(up, front), (up, right), (front, right)], strict=True
    ):
        bright = frames[0, top : top + height, :width] == 255
        drawn = (bright.any(axis=1).sum(), bright.any(axis=0).sum())
        assert drawn == edges and bright.sum() == edges[0] * edges[1]
        top += height
    assert width == max(right, front, 64) + GAP


def test_a_sheet_of_a_segmentation_shows_classes_of_a_whole_volume(tmp_path):
    image, truth = ellipsoid((40, 48, 32))
    predicted = np.zeros_like(truth.numpy())
    predicted.flags.writeable = False  # as what is mapped from a file
    path = tmp_path / "segmentation-slices.png"
    save_segmentation_slices(path, image, truth, predicted, (1.0, 1.0, 1.0))
    frames, about = frames_of(path)
    assert about["columns"] == ["image", "truth", "predicted"]
    assert (about["frames"], about["heights"]) == (24, [64 + GAP, 64 + GAP, 96 + GAP])
    width = frames.shape[2] // 3
    is_class = [(frames == class_colour(label)).all(axis=-1) for label in (1, 2)]
    assert is_class[0][12, :, width : 2 * width].sum() > 1000
    assert not (is_class[0] | is_class[1])[:, :, 2 * width :].any()
    # the lesion lies 0.3 of the way to the right, 0.4 to the front: above on the left of an axial
    rows, columns = np.nonzero(is_class[1][14, 136:, width : 2 * width])
    assert rows.max() < (96 + GAP) / 2 and columns.max() < width / 2


def test_colours_and_greys_are_shrunk_as_means(tmp_path):
    """In a volume of 256 voxels along every axis a pixel is 2 by 2 of a plane."""
    image = torch.zeros(1, 1, 1, 1).expand(1, 256, 256, 256)
    labels = torch.zeros(256, dtype=torch.uint8)
    labels[::2] = 1
    labels = labels.expand(256, 256, 256)  # alternating upwards
    save_segmentation_slices(tmp_path / "s.png", image, labels, labels, (1.0, 1.0, 1.0))
    frame = frames_of(tmp_path / "s.png")[0][3]
    assert frame[66, 132 + 66].tolist() == [round(value / 2) for value in class_colour(1)]


def test_two_volumes_stand_below_each_other_on_a_sheet_that_is_not_too_tall(tmp_path):
    images = torch.stack([torch.full((1, 32, 32, 32), value) for value in (0.2, 0.8)])
    hidden = torch.zeros(2, 32, 32, 32, dtype=torch.bool)
    save_reconstruction_slices(tmp_path / "r.png", images, hidden, images, (1.0, 1.0, 1.0))
    frames, about = frames_of(tmp_path / "r.png", "L")
    assert about["planes"] == list(PLANES) * 2 and about["heights"] == [132] * 6
    assert about["frames"] == 16_000 // (6 * 132) == 20
    assert [frames[7, 66 + 132 * place, 66] for place in range(6)] == [51] * 3 + [204] * 3


def test_a_sheet_keeps_to_its_bytes_by_smaller_planes(tmp_path, monkeypatch):
    noise = torch.rand(3, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(64, 64, 64, dtype=torch.uint8)
    heights = []
    for most in (100_000_000, 400_000):
        monkeypatch.setattr(pictures, "MOST_BYTES", most)
        save_segmentation_slices(tmp_path / "s.png", noise, labels, labels, (1.0, 1.0, 1.0))
        assert (tmp_path / "s.png").stat().st_size <= most
        heights.append(frames_of(tmp_path / "s.png")[1]["heights"][0])
    assert heights[0] == 132 and 20 < heights[1] < 100


def test_more_than_three_channels_show_the_first_three(tmp_path):
    images = torch.zeros(1, 5, 128, 128)
    images[:, :3] = torch.tensor([1.0, 0.0, 0.6]).view(1, 3, 1, 1)
    images[:, 3:] = 0.9
    labels = torch.zeros(1, 128, 128, dtype=torch.long)
    save_segmentation(tmp_path / "five.png", images, labels, labels)
    save_segmentation(tmp_path / "two.png", images[:, :2], labels, labels)
    assert read(tmp_path / "five.png")[0, 0].tolist() == [255, 0, 153]
    assert read(tmp_path / "two.png")[0, 0].tolist() == [255, 0, 0]


def test_the_first_twenty_classes_differ_in_colour():
    colours = [class_colour(label) for label in range(1, 21)]
    assert len(set(colours)) == 20
    assert class_colour(8) == tuple(value // 2 for value in class_colour(1))


def test_masks_show_one_draw_in_grey_and_how_often_as_heat_over_the_image(tmp_path):
    images = torch.full((1, 1, 128, 128), 0.4)  # 102, in eight levels of grey 96
    hidden = torch.zeros(1, 128, 128, dtype=torch.bool)
    hidden[:, :64] = True
    often = torch.zeros(1, 128, 128)
    often[:, 32:64], often[:, 64:96], often[:, 96:] = 0.2, 0.5, 1.0
    columns = save_masks(tmp_path / "m.png", images, hidden, often)
    assert columns == ["image", "hidden in one draw", "how often hidden"]
    grid = read(tmp_path / "m.png")
    assert grid.shape == (128, 3 * 128 + 2 * GAP, 3)
    assert (grid[:, :128] == 102).all()
    assert [grid[y, 128 + GAP].tolist() for y in (0, 127)] == [[128] * 3, [102] * 3]
    heat = [grid[y, 2 * (128 + GAP)].tolist() for y in (0, 32, 64, 96)]
    # four parts of the colour and one of the grey; at 0.5 (128 of 255) between the middle two
    assert heat == [
        [19, (4 * 32 + 96) // 5, (4 * 77 + 96) // 5],
        [(4 * 49 + 96) // 5, (4 * 68 + 96) // 5, (4 * 107 + 96) // 5],
        [(4 * 126 + 96) // 5, (4 * 124 + 96) // 5, (4 * 116 + 96) // 5],
        [(4 * 255 + 96) // 5, (4 * 234 + 96) // 5, (4 * 70 + 96) // 5],
    ]


def test_a_share_has_the_same_colour_whatever_else_the_picture_holds(tmp_path):
    images, hidden = torch.zeros(1, 1, 128, 128), torch.zeros(1, 128, 128, dtype=torch.bool)
    shown = []
    for others in (0.0, 1.0):
        often = torch.full((1, 128, 128), others)
        often[:, 0] = 0.6
        save_masks(tmp_path / "m.png", images, hidden, often)
        shown.append(read(tmp_path / "m.png")[0, -1].tolist())
    assert shown[0] == shown[1] == [149 * 4 // 5, 143 * 4 // 5, 120 * 4 // 5]


def test_masks_show_the_classes_where_they_are_known(tmp_path):
    images, hidden = torch.full((1, 1, 4, 4), 0.4), torch.zeros(1, 4, 4, dtype=torch.bool)
    classes = torch.zeros(1, 4, 4, dtype=torch.long)
    classes[0, 0, 0], classes[0, 0, 1] = 2, 255
    columns = save_masks(tmp_path / "m.png", images, hidden, hidden.float(), classes)
    assert columns == ["image", "classes", "hidden in one draw", "how often hidden"]
    grid = read(tmp_path / "m.png")
    assert [grid[0, 128 + GAP + x].tolist() for x in (0, 32, 64)] == [
        list(class_colour(2)),
        [160] * 3,
        [51] * 3,
    ]


def test_heat_is_lighter_the_more_often_and_as_the_pages_legends_show_it():
    lightness = [0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in HEAT]
    assert lightness == sorted(lightness)
    legend = [tuple(bytes.fromhex(colour[1:])) for _, colour in theme.SCALE]
    assert legend == list(HEAT)
