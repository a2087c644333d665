"""What the machine draws while a run goes on, as codecarbon estimates it, in a process of its own.

`Meter` starts this file as a program, which imports nothing of the package: whatever codecarbon does or fails at, the
run's process, its random numbers and its time are left alone. The program writes one JSON line a minute and one at its
end; it ends with its standard input, so also where the run is killed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile

GRACE = 5  # seconds after which the program begins: a shorter run pays nothing
INTERVAL = 60  # seconds between measurements
PATIENCE = 10  # seconds that a run waits for the last measurement


class Meter:
    """Measures from a few seconds after its start until `close`; `read` gives what there is so far."""

    def __init__(self, country: str = "", grace: float = GRACE):
        self.process, self.last, self.reason = None, {}, ""
        if importlib.util.find_spec("codecarbon") is None:
            self.reason = "codecarbon is not installed (pip install 'multimodal_fm[energy]')"
            return
        command = [sys.executable, "-P", __file__, str(grace), country]
        try:
            self.output = tempfile.TemporaryFile()
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=self.output, stderr=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            self.reason = f"codecarbon cannot be started: {error.strerror}"

    def read(self) -> dict:
        """The last measurement, summed up from the start: see `Lines.out`; `{"not_measured": reason}` without one."""
        if self.process:
            with contextlib.suppress(OSError, ValueError):
                data = os.pread(self.output.fileno(), os.fstat(self.output.fileno()).st_size, 0)
                self.last = json.loads(data[: data.rfind(b"\n")].rpartition(b"\n")[2])
        reason = self.last.get("not_measured") or self.reason or f"no measurement yet ({GRACE} seconds and more)"
        return self.last if "energy_kwh" in self.last else {"not_measured": reason}

    def close(self) -> None:
        """End the program, after a last measurement where there was a first one."""
        if self.process:
            if "energy_kwh" in self.read():
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    self.process.communicate(b"\n", timeout=PATIENCE)
            self.process.kill()
            self.process.wait()
            self.reason = "the run had ended before the first measurement"
            self.read()
            self.output.close()
            self.process = None


def measure(grace: float, country: str) -> None:
    """The program: measure until a line or the end comes from standard input."""
    if select.select([sys.stdin], [], [], grace)[0]:
        return
    import logging

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    from codecarbon import OfflineEmissionsTracker
    from codecarbon.core.cpu import is_rapl_available
    from codecarbon.input import DataSource
    from codecarbon.output_methods.base_output import BaseOutput

    mix = DataSource().get_global_energy_mix_data().get(country)
    read_cpu = "read from its counters (RAPL)" if is_rapl_available() else "estimated from its load and nominal power"

    class Lines(BaseOutput):
        def out(self, total, delta):
            """Writes the sums so far as one line."""
            source = "the world's mean" + ("" if mix else f", since it knows no country {country}" if country else "")
            row = {
                "energy_kwh": total.energy_consumed,
                "cpu_kwh": total.cpu_energy,
                "gpu_kwh": total.gpu_energy,
                "memory_kwh": total.ram_energy,
                "co2e_kg": total.emissions,
                "seconds": total.duration,
                "carbon_intensity_g_per_kwh": 1000 * total.emissions / (total.energy_consumed or 1),
                "carbon_intensity_from": f"codecarbon {total.codecarbon_version}: "
                + (f"the electricity of {mix['country_name']} in {mix['year']}" if mix else source),
                "power_usage_effectiveness": total.pue,
                "estimated": True,
                "why": f"the whole machine, with all else that ran on it; the processor's power is {read_cpu}, "
                "the memory's is estimated from its size; neither network, cooling nor manufacture counts",
            }
            print(json.dumps(row), flush=True)

        live_out = out

    tracker = OfflineEmissionsTracker(
        measure_power_secs=INTERVAL,
        api_call_interval=1,
        output_methods=[],
        output_handlers=[Lines()],
        emissions_endpoint=False,  # whatever a configuration of codecarbon's says: nothing leaves the machine
        electricitymaps_api_token=False,
        log_level="critical",
        allow_multiple_runs=True,
        **({"country_iso_code": country} if mix else {}),
    )
    tracker.start()
    sys.stdin.readline()
    tracker.stop()


if __name__ == "__main__":
    try:
        measure(float(sys.argv[1]), sys.argv[2])
    except Exception as error:  # the reason is for the run's record
        print(json.dumps({"not_measured": f"codecarbon failed: {type(error).__name__}: {error}"}), flush=True)
