"""What this machine has, read in this process: the way without `--hosts`."""

from __future__ import annotations

import os
from collections.abc import Iterable

from glmplan.facts.gpu import GpuProblem
from glmplan.facts.gpu_profile import GpuProfile
from glmplan.facts.host import Host
from glmplan.node import procfs
from glmplan.node.errors import NodeError
from glmplan.node.gpus import read_gpus
from glmplan.probe.gpus import gpu, problem_error
from glmplan.probe.remote import FactsRequest, to_host
from glmplan.transport.base import HostName


def probe_local(profiles: Iterable[GpuProfile]) -> Host:
    """Read every GPU of this machine; raise ProbeError when one of them, or all of them, cannot be read.

    `profiles` are read only once a driver answers.
    """
    try:
        found = read_gpus()
    except NodeError as error:
        problem = GpuProblem(kind=error.kind, message=error.message, next_step=error.next_step)
        raise problem_error(problem) from error
    known = tuple(profiles)
    return Host(
        name="localhost",
        hostname=os.uname().nodename,
        driver_version=found["driver_version"],
        nvml_version=found["nvml_version"],
        cuda_version=found["cuda_version"],
        memory_total_bytes=procfs.memory().get("MemTotal"),
        gpus=tuple(gpu(reading, known) for reading in found["gpus"]),
    )


def facts_here(request: FactsRequest, profiles: Iterable[GpuProfile]) -> Host:
    """Everything about this machine; GPUs that cannot be read are its `gpu_problem`."""
    from glmplan.node.facts import facts

    return to_host(facts(request.message(HostName("localhost", is_local=True))), "localhost", profiles)
