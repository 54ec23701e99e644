"""nvidia-smi's output, as a host of two H100s prints it (driver 580.159.04), and variations."""

from __future__ import annotations

from sglang_moelb.doctor.facts import Gpu
from sglang_moelb.doctor.parse import cuda_of, gpus_of, matrix_of, peers_of

TOPO = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-15\t0\t\tN/A
GPU1\tNV18\t X \tNODE\tSYS\t0-15\t0\t\tN/A
GPU2\tSYS\tNODE\t X \tSYS\t0-15\t0\t\tN/A
NIC0\tPIX\tSYS\tSYS\t X \t\t\t\t

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
"""
TWO_H100 = """\
\t\x1b[4mGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\t0-31\t0\t\tN/A
GPU1\tNV18\t X \t0-31\t0\t\tN/A

Legend:

  X    = Self
"""
ONE = "\tGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\nGPU0\t X \t0-15\t0\t\tN/A\n"
P2P = """\
 \t\x1b[4mGPU0\tGPU1\t\x1b[0m
 GPU0\tX\tOK\t
 GPU1\tCNS\tX\t

Legend:

  X    = Self
  OK   = Status Ok
  CNS  = Chipset not supported
"""


def test_gpus_are_read_from_csv_with_a_comma_and_a_space() -> None:
    text = "NVIDIA H100 80GB HBM3, 9.0, 81559, 580.65.06\nTesla T4, [N/A], [N/A], 580.65.06\n"
    gpus, driver = gpus_of(text)
    assert gpus == (
        Gpu(name="NVIDIA H100 80GB HBM3", capability=(9, 0), memory_mib=81559),
        Gpu(name="Tesla T4", capability=(0, 0), memory_mib=0),
    )
    assert driver == "580.65.06"


def test_no_devices_is_no_gpu() -> None:
    assert gpus_of("No devices were found\n") == ((), "")
    assert gpus_of("") == ((), "")


def test_the_topology_is_the_gpu_part_without_cards_affinities_and_escapes() -> None:
    assert matrix_of(TOPO) == (("X", "NV18", "SYS"), ("NV18", "X", "NODE"), ("SYS", "NODE", "X"))
    assert matrix_of(TWO_H100) == (("X", "NV18"), ("NV18", "X"))
    assert matrix_of(ONE) == (("X",),)


def test_a_topology_that_is_cut_short_says_nothing() -> None:
    assert matrix_of("GPU0\t X \nGPU1\tNV18\t X \n") == ()
    assert matrix_of("nvidia-smi: command failed") == ()


def test_peer_access_is_what_reads_ok() -> None:
    assert peers_of(matrix_of(P2P)) == ((True, True), (False, True))


def test_the_cuda_version_is_read_without_importing_torch() -> None:
    assert cuda_of("cuda: Optional[str] = '13.0'\nhip = None\n") == "13.0"
    assert cuda_of("cuda: Optional[str] = None\n") == ""
    assert cuda_of("cuda = '12.8'\n") == "12.8"
    assert cuda_of("") == ""
