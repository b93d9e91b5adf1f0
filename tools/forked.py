"""Kernels forked from one process that has the heavy libraries loaded: each saves the ten seconds that these take."""

import os
import signal
import sys
from multiprocessing import get_context

from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

# Imported, and nothing of them called: threads do not survive a fork. The library itself is each notebook's own affair.
HEAVY = ["torch", "torchvision", "matplotlib.pyplot", "scipy.optimize", "pycocotools.cocoeval", "accelerate",
         "ipywidgets", "ipykernel.ipkernel"]
FORKSERVER = get_context("forkserver")


def become_kernel(arguments: list[str], environment: dict[str, str], folder: str | None) -> None:
    """What the forked process does: the same as `python -m ipykernel_launcher` in a session of its own."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment, JPY_PARENT_PID=str(os.getppid()))  # the kernel ends when that process does
    os.chdir(folder or ".")
    sys.argv = ["ipykernel_launcher", *arguments]
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance(argv=arguments)


class Forked:
    """A forked kernel, with as much of `subprocess.Popen` as a provisioner uses."""

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], environment: dict[str, str], folder: str | None):
        arguments = command[command.index("ipykernel_launcher") + 1:]
        self.process = FORKSERVER.Process(target=become_kernel, args=(arguments, environment, folder))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Provisioner(LocalProvisioner):
    """Forks where Jupyter's own starts a program."""

    async def launch_kernel(self, cmd: list[str], **kwargs) -> dict[str, object]:
        self.process = Forked(cmd, kwargs["env"], kwargs.get("cwd"))
        self.pid = self.pgid = self.process.pid
        return self.connection_info


class ForkedKernels(AsyncKernelManager):
    """The manager that nbclient starts its kernels with."""

    async def _async_pre_start_kernel(self, **kwargs) -> tuple[list[str], dict[str, object]]:
        if self.provisioner is None:
            self.provisioner = Provisioner(kernel_id=self.kernel_id or "", kernel_spec=self.kernel_spec, parent=self)
        return await super()._async_pre_start_kernel(**kwargs)


def load_once() -> None:
    """Have the heavy libraries loaded in the process that kernels are forked from; it starts with the first of them."""
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as kernels set it, too late here
    FORKSERVER.set_forkserver_preload(["__main__", *HEAVY])
