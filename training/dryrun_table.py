"""What --mode=dryrun prints: the table, and which keys make a step smaller."""


def advice(config, mesh: dict[str, int], result: dict) -> list[str]:
    """Config keys that would make the step smaller, most promising first, with what each saves."""
    lines, devices = [], result["devices"]
    spread = mesh["fsdp"] * mesh["tensor"]
    state, temporaries = result["argument_bytes"] - result["batch_bytes"], result["temp_bytes"]
    if spread < devices:
        lines.append(
            f"mesh.fsdp (now {mesh['fsdp']}): the state takes {gib(state)} a device; split "
            f"over all {devices} devices (mesh.data=1, mesh.fsdp=-1) up to {devices // spread} "
            "times less"
        )
    elif mesh["fsdp"] > 2 and state > 4 * 3 * 4 * result["params"] / spread:
        lines.append(
            f"mesh.fsdp (now {mesh['fsdp']}): the state takes {gib(state)} a device, since so many "
            "parts divide few of its arrays; half as many parts or fewer (mesh.data takes the "
            "rest) may divide more"
        )
    if mesh["tensor"] == 1:
        lines.append("mesh.tensor (now 1): splits the widest activations and the logits as well")
    if config.remat != "full":
        lines.append(f"remat (now {config.remat!r}): 'full' keeps one activation a layer")
    rows = max(config.batch_size // devices, 1)
    if temporaries and rows > config.accumulate:
        lines.append(
            f"accumulate (now {config.accumulate}): temporaries of {gib(temporaries)} shrink "
            f"almost in proportion; up to {rows} divides the {rows} rows of a device"
        )
    if config.precision == "float32":
        lines.append("precision (now 'float32'): 'bfloat16' halves the activations")
    if rows > 1:
        lines.append(f"batch_size (now {config.batch_size}): {rows} rows a device")
    return lines


def gib(size: float) -> str:
    """Bytes for people: GiB from a tenth up, MiB below."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"


def table(result: dict) -> str:
    """What the user reads."""
    room = result["hbm_bytes"] - result["total_bytes"]
    temporaries = result["temp_bytes"]
    verdict = f"fits, {gib(room)} to spare" if result["fits"] else f"does NOT fit, by {gib(-room)}"
    rows = [
        ("topology", f"{result['topology']} ({result['devices']} devices)"),
        ("parameters", f"{result['params']:,}"),
        ("arguments per device", gib(result["argument_bytes"])),
        ("temporaries per device", gib(temporaries) if temporaries else "unknown: not compiled"),
        ("total per device", gib(result["total_bytes"])),
        ("HBM per device", gib(result["hbm_bytes"])),
        ("verdict", verdict),
        ("model FLOPs per step", f"{result['flops_per_step']:.4g}"),
        ("compile time", f"{result['compile_seconds']:.1f} s"),
    ]
    for kind, (times, moved) in result["collectives"].items():
        rows.append((kind, f"{times} per step, each device sends {gib(moved)}"))
    if result["estimated_step_seconds"] is not None:
        parts = result["parts"]
        rows += [
            ("step time (estimate)", f"{result['estimated_step_seconds']:.4g} s"),
            (
                "  of it (estimate)",
                f"compute {parts['compute']:.4g} s, collectives {parts['hidden']:.4g} s hidden "
                f"behind it, {parts['exposed']:.4g} s not",
            ),
            ("MFU (estimate)", f"{100 * result['estimated_mfu']:.1f} %"),
            ("memory traffic per device", f"{gib(result['moved_bytes'])} read or written a step"),
        ]
    if sampler := result["sampler"]:
        rows.append((f"sampler: {sampler['name']}", _sampler_text(sampler)))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    if not result["fits"]:
        what = f"The step needs {gib(-room)} more than a device has"
        lines.append(f"{what}{'' if temporaries else ', or more'}. Config keys that change that:")
        lines += [f"  {line}" for line in result["advice"]]
    return "\n".join(lines)


def _sampler_text(sampler: dict) -> str:
    if sampler["seconds"] is None:
        return "does NOT fit"
    rows = "one row" if sampler["rows"] == 1 else f"{sampler['rows']} rows"
    return (
        f"{rows}, {gib(sampler['total_bytes'])} per device, {gib(sampler['moved_bytes'])} read or "
        f"written, {sampler['seconds']:.3g} s (estimate)"
    )
