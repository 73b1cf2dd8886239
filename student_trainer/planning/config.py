"""The machine that `--dry-run` plans for: the `plan` section of the configuration."""

from __future__ import annotations

from pydantic import Field, model_validator

from teacher_api.settings import Section


class PlanConfig(Section):
    """Only read with --dry-run. Without `device_memory_gib` the plan is for this machine, and is measured on it."""

    device_memory_gib: float = Field(0.0, ge=0, le=100_000)
    """Memory of one device of a machine to plan for. Nothing is loaded then but configurations and prompts, and no
    teacher is asked. 0: this machine."""
    devices: int = Field(1, ge=1, le=100_000)
    """Devices that train, one process each."""
    peak_tflops: float = Field(0.0, ge=0, le=1e6)
    """Of one device, at matrix products in the student's arithmetic, as its data sheet says, in 10^12 FLOP/s; 0: no
    speed is predicted."""
    memory_bandwidth_gb_s: float = Field(0.0, ge=0, le=1e6)
    """Of one device's memory, in 10^9 bytes a second."""
    utilisation: float = Field(0.4, gt=0, le=1)
    """Share of both that is reached."""
    teacher_model: str = ""
    """Directory or hub id whose config.json describes the teacher; empty: teacher.model, or the teacher is left out."""
    teacher_devices: int = Field(0, ge=0, le=100_000)
    """Devices that score; 0: as few as hold the teacher."""

    @property
    def is_described(self) -> bool:
        return self.device_memory_gib > 0

    @model_validator(mode="after")
    def _complete(self) -> PlanConfig:
        fields = type(self).model_fields
        for name in sorted(self.model_fields_set - {"device_memory_gib"}):
            if not self.is_described and getattr(self, name) != fields[name].default:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} without device_memory_gib, expected none: it describes "
                    "another machine than this"
                )
        if bool(self.peak_tflops) != bool(self.memory_bandwidth_gb_s):
            got = "peak_tflops" if self.peak_tflops else "memory_bandwidth_gb_s"
            raise ValueError(f"got {got} alone, expected peak_tflops and memory_bandwidth_gb_s: speed needs both")
        if self.utilisation != fields["utilisation"].default and not self.peak_tflops:
            raise ValueError(f"utilisation: got {self.utilisation} without peak_tflops, expected none")
        return self
