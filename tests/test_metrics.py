"""Metrics and threshold against scikit-learn and the definitions, spelled out."""

from functools import partial

import common

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import roc_auc_score


def brute_force_au_pro(maps, masks, max_fpr):
    """Every threshold, every region, as the definition says; then the area by trapezoids."""
    regions = []
    for i, mask in enumerate(masks):
        labeled, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [(i, labeled == n) for n in range(1, count + 1)]
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        above = maps >= threshold
        fpr = above[~masks].mean()
        points.append((fpr, np.mean([above[i][region].mean() for i, region in regions])))
    fpr, overlap = np.array(points).T
    end = np.interp(max_fpr, fpr, overlap)
    keep = fpr <= max_fpr
    return np.trapezoid([*overlap[keep], end], [*fpr[keep], max_fpr]) / max_fpr


@pytest.fixture
def maps_and_masks():
    random = np.random.default_rng(0)
    masks = ndimage.gaussian_filter(random.standard_normal((5, 24, 24)), (0, 2, 2)) > 0.22
    masks[0] = False
    masks[4, :4, :4] = np.eye(4)  # a region's pixels may touch at their corners alone
    return random.standard_normal((5, 24, 24)) + masks, masks


def test_pixels_of_photos_without_a_mask_count_for_nothing(maps_and_masks):
    maps, masks = maps_and_masks
    kinds = np.array(["good", "a", "a", "b", "b"])
    regions = torch.from_numpy(ndimage.label(masks, np.ones((3, 3, 3)))[0])
    regions[3:] = 0
    test = common.Split(kinds, kinds, None, regions, kinds != "b")
    result = common.Result(maps.max((1, 2)), torch.from_numpy(maps), None)
    found = common.metrics_of(test, result, result.scores > 2, kinds != "good")
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(masks[:3].ravel(), maps[:3].ravel()))
    assert found["image_auroc"] == roc_auc_score(kinds != "good", result.scores)
    assert found["reported"] == (result.scores[1:] > 2).sum()


@pytest.mark.parametrize("max_fpr", [0.05, 0.3, 1.0])
def test_au_pro_equals_brute_force(maps_and_masks, max_fpr):
    maps, masks = maps_and_masks
    for values in (maps, maps.round()):  # with ties
        expected = brute_force_au_pro(values, masks, max_fpr)
        assert common.au_pro(values, masks, max_fpr) == pytest.approx(expected, abs=1e-9)


def test_image_and_pixel_auroc_equal_scikit_learn(maps_and_masks):
    maps, masks = maps_and_masks
    for values in (maps, maps.round()):  # ties count half
        expected = roc_auc_score(masks.ravel(), values.ravel())
        found = common.pixel_auroc(torch.from_numpy(values), torch.from_numpy(masks))
        assert found == pytest.approx(expected, abs=1e-12)
    scores, labels = maps.max((1, 2)), masks.any((1, 2))
    assert common.image_auroc(scores, labels) == roc_auc_score(labels, scores)


def test_labels_of_any_two_kinds_are_read_as_by_scikit_learn():
    scores = [0.1, 0.9, 0.4]
    for labels in ([0, 1, 1], [-1, 1, 1], ["0", "1", "1"], [False, True, True]):
        assert common.image_auroc(scores, labels) == 1.0
    with pytest.raises(ValueError, match="multi_class"):
        common.image_auroc(scores, [0, 1, 2])


def test_masks_of_integers_are_labeled_unless_they_number_regions(maps_and_masks):
    maps, masks = maps_and_masks
    expected = common.au_pro(maps, masks)
    for value in (1, 255):
        ready = np.uint8(value * masks)
        assert common.au_pro(maps, ready) == expected
        assert common.au_pro(maps[:, None], ready[:, None]) == expected
        assert common.pixel_auroc(maps, ready) == common.pixel_auroc(maps, masks)
        assert common.au_pro(maps[1], ready[1]) == common.au_pro(maps[1], masks[1])
    assert common.au_pro(maps[1], masks[1]) == common.au_pro(maps[1:2], masks[1:2])
    last = maps[..., None], masks[..., None]
    for pair in [(maps, masks * 1.0), (maps, masks[:2]), (maps, masks[..., :9]), last]:
        with pytest.raises(ValueError, match="expected equal shapes, maps without NaN, and masks"):
            common.au_pro(*pair)
    with pytest.raises(ValueError, match="without NaN"):
        common.pixel_auroc(np.where(maps > 2, np.nan, maps), masks)


@pytest.mark.parametrize("value", [False, True])
def test_metrics_of_one_class_are_none(value):
    masks = np.full((2, 8, 8), value)
    assert common.image_auroc(np.arange(2), masks[:, 0, 0]) is None
    assert common.pixel_auroc(np.zeros((2, 8, 8)), masks) is None
    assert common.au_pro(np.zeros((2, 8, 8)), masks) is None


def test_conformal_quantile_by_hand():
    scores = torch.arange(1.0, 20.0)  # 19 normal images: the rank is ceil(20 * (1 - rate))
    assert common.conformal_quantile(scores, 0.05) == 19
    assert common.conformal_quantile(scores, 0.10) == 18
    assert common.conformal_quantile(scores, 0.50) == 10
    assert common.conformal_quantile(scores, 0.01) == 19  # too few: the largest has to do
    for wrong in (0, 1):
        for function in (common.scores_needed, partial(common.conformal_quantile, scores)):
            with pytest.raises(ValueError, match="expected between 0 and 1"):
                function(wrong)


@pytest.mark.parametrize("rate", [0.05, 0.1])
def test_conformal_threshold_keeps_the_rate_on_new_normals(rate):
    random = np.random.default_rng(0)
    rates = []
    for _ in range(2000):
        threshold = common.conformal_quantile(random.gamma(2, size=50), rate)
        rates.append((random.gamma(2, size=200) > threshold).mean())
    assert rate - 1 / 51 <= np.mean(rates) <= rate


def test_thresholds_warn_of_too_few_normals(capsys):
    model = {"scores": torch.arange(6.0), "peaks": None}
    assert common.thresholds(model, 0.05) == (5, None)
    assert "takes 19 normal images" in capsys.readouterr().err
    scores = torch.arange(1.0, 41)  # rank 37 of 40 at 10 %, 19 of 19 at 5 %
    model = {"scores": scores, "peaks": 2 * scores, "median": 0.5}
    assert common.thresholds(model, 0.1) == (37, (0.5, 74, 147.5))  # both of the same rank
    assert common.thresholds(model | {"scores": scores[:19], "peaks": None}, 0.05) == (19, None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("max_fpr", [0, -0.1, 1.1, np.nan])
def test_a_rate_that_ends_no_curve_is_refused(maps_and_masks, max_fpr):
    with pytest.raises(ValueError, match=r"max_fpr is .*: expected more than 0 and at most 1"):
        common.au_pro(*maps_and_masks, max_fpr)


def test_regions_given_are_not_found_anew():
    """Two pieces of one region, as a thin one leaves when it shrinks, count together."""
    regions = np.zeros((1, 8, 8), np.int32)
    regions[0, 1, 1] = regions[0, 5, 5] = 7
    regions[0, 1, 5] = 3
    found = np.zeros((1, 8, 8))
    found[0, 1, 1] = 1
    assert common.au_pro(found, regions, 1e-9) == pytest.approx(1 / 4)
    assert common.au_pro(found, regions > 0, 1e-9) == pytest.approx(1 / 3)
