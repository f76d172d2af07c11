"""The unpruned rows of the papers' tables, as `cost` counts them."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch
import torchvision

import dcx_kernels as dcx
from dcx_kernels.models import m_cifarnet, vgg19

IMAGE = torch.zeros(1, 3, 32, 32)
MAKE = {
    "vgg19": vgg19,
    "resnet50": torchvision.models.resnet50,
    "densenet121": torchvision.models.densenet121,
}
# inputs of the last linear layer, all that depends on the number of classes
FEATURES = {"vgg19": 512, "resnet50": 2048, "densenet121": 1024}

# dynamic channel execution, Table 1: millions of parameters, 1e8 multiply-accumulates
DCE_TABLE_1 = [
    ("vgg19", 10, "20.035", "3.98"),
    ("resnet50", 10, "23.52", "0.85"),
    ("densenet121", 10, "6.96", "0.59"),
    ("vgg19", 100, "20.08", "4"),
    ("resnet50", 100, "23.7", "0.86"),
    ("densenet121", 100, "7.05", "0.60"),
]


@pytest.mark.parametrize(("name", "classes", "params", "macs"), DCE_TABLE_1)
def test_dce_table_1(name, classes, params, macs):
    cost = dcx.cost(MAKE[name](num_classes=classes), IMAGE)
    # the table cuts digits off: ResNet-50 has 23.529 million, DenseNet-121 with 100 classes 7.056
    unit = Decimal(1).scaleb(Decimal(params).as_tuple().exponent)
    assert 0 <= Decimal(cost.params) / 10**6 - Decimal(params) < unit

    # the paper's counter adds what is no multiply-accumulate: two operations an output of each norm
    # would make 0.839 of our 0.834 (ResNet-50) and 0.585 of 0.578 (DenseNet-121); the rest of the
    # way to 0.85 and 0.59 is not explained
    tolerance = 0.02 * float(macs) * 1e8
    if classes == 100:
        # 90 more classes cost less than 0.002e8 (next test), yet the table's second decimal moves
        # by one: up to that unit is the table's rounding
        tolerance += 0.01e8
    assert abs(cost.macs - float(macs) * 1e8) <= tolerance


@pytest.mark.parametrize("name", list(MAKE))
def test_classes_cost_a_row_of_the_last_layer(name):
    few, many = (dcx.cost(MAKE[name](num_classes=classes), IMAGE) for classes in (10, 100))
    assert many.params - few.params == 90 * (FEATURES[name] + 1)
    assert many.macs - few.macs == 90 * FEATURES[name] < 0.002e8


def test_fbs_table_4():
    cost = dcx.cost(m_cifarnet(), IMAGE)
    assert round(cost.params / 1e6, 2) == 1.30
    assert round(cost.macs / 1e6, 1) == 174.3
