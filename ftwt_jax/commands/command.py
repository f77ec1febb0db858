"""The flags of each command."""

from absl import flags
from ml_collections import config_flags

# Flag that holds a field of a config that is not known yet.
FIELD = "field"


def _workdir(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)


def _distributed(values: flags.FlagValues) -> None:
    flags.DEFINE_bool(
        "distributed",
        None,
        "join the other processes of this run; by itself under srun, mpirun and JAX_COORDINATOR_ADDRESS",
        flag_values=values,
    )


def _config(values: flags.FlagValues, arguments: list[str]) -> None:
    config_flags.DEFINE_config_file(
        "config",
        None,
        "configs/DATA.py or configs/DATA.py:ARCH; fields by --config.FIELD=VALUE",
        flag_values=values,
        sys_argv=["ftwt", *arguments],
    )


def define_train(values: flags.FlagValues, arguments: list[str]) -> None:
    _workdir(values)
    _distributed(values)
    _config(values, arguments)


def define_estimate(values: flags.FlagValues, arguments: list[str]) -> None:
    _workdir(values)
    flags.DEFINE_string("r", None, "mass thresholds to predict for, such as 0.8,0.9,1", flag_values=values)
    flags.DEFINE_float("budget", None, "MACs reduction to find r for, such as 0.5", flag_values=values)
    _distributed(values)


def define_evaluate(values: flags.FlagValues, arguments: list[str]) -> None:
    _workdir(values)
    flags.DEFINE_bool("best", False, "the checkpoint of highest accuracy, not the newest", flag_values=values)
    flags.DEFINE_string("budgets", None, "MACs reductions to bring the network to, such as 0.3,0.5", flag_values=values)
    flags.DEFINE_bool(
        "corruptions", False, "on noise, blur, contrast, brightness and JPEG at five severities too", flag_values=values
    )
    flags.DEFINE_string(
        "corruptions_from",
        None,
        "with --corruptions: images that are corrupted already, tfds:cifar10_corrupted",
        flag_values=values,
    )
    _distributed(values)


def define_prepare(values: flags.FlagValues, arguments: list[str]) -> None:
    flags.DEFINE_string(
        "data_dir", None, "where TFDS keeps its data, if not where it does by itself", flag_values=values
    )


def define_benchmark(values: flags.FlagValues, arguments: list[str]) -> None:
    _workdir(values)
    flags.DEFINE_string("arch", None, "a network with synthetic gates, in place of a trained one", flag_values=values)
    flags.DEFINE_float("budget", None, "MACs reduction to bring the gates to; --arch needs one", flag_values=values)
    flags.DEFINE_integer(
        "image_size", None, "with --arch: side of the images; 32 or 224", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer("batch", 1, "images at once", flag_values=values)
    flags.DEFINE_bool("torch", False, "time PyTorch's dense network too", flag_values=values)
    flags.DEFINE_bool("train", False, "time a dense and a gated training step too", flag_values=values)
    _config(values, arguments)
    flags.DEFINE_bool("input", False, "time the input of training alone; needs --config", flag_values=values)
    flags.DEFINE_float("seconds", 10.0, "with --input: how long to measure", flag_values=values)


def define_convert(values: flags.FlagValues, arguments: list[str]) -> None:
    flags.DEFINE_string("arch", None, "the network, such as resnet34", flag_values=values)
    flags.DEFINE_string("checkpoint", None, "file to read: .safetensors, or what torch.save wrote", flag_values=values)
    flags.DEFINE_string("out", None, "folder to write", flag_values=values)
    flags.DEFINE_list("mean", None, "mean of the images it was trained on, such as 0.5,0.5,0.5", flag_values=values)
    flags.DEFINE_list("std", None, "their standard deviation", flag_values=values)
    # Without --config, which is then chosen by what the checkpoint holds, its fields are kept until it is.
    flags.DEFINE_multi_string(FIELD, [], "a field of the config, as FIELD=VALUE", flag_values=values)
    _config(values, arguments)


def define_export(values: flags.FlagValues, arguments: list[str]) -> None:
    _workdir(values)
    flags.DEFINE_string("out", None, "file to write, such as resnet34.safetensors", flag_values=values)
    flags.DEFINE_enum(
        "format",
        None,
        ["safetensors", "stablehlo"],
        "weights for PyTorch, or a program that runs without this package; by itself what --out ends in",
        flag_values=values,
    )
    flags.DEFINE_bool("compact", False, "of a program: filters left out, one image at a time", flag_values=values)
    flags.DEFINE_float("budget", None, "of a program: MACs reduction to bring the gates to", flag_values=values)
    flags.DEFINE_string(
        "layout", None, "names: published, torchvision, huggingface or timm; if not as it came", flag_values=values
    )
    flags.DEFINE_bool("baseline", False, "the dense baseline, not the gated network", flag_values=values)
    flags.DEFINE_bool("best", False, "the checkpoint of highest accuracy, not the newest", flag_values=values)


def define_plan(values: flags.FlagValues, arguments: list[str]) -> None:
    flags.DEFINE_string("topology", None, "the TPU slice: v4, v5e, v5p or v6e and its shape", flag_values=values)
    _config(values, arguments)
    flags.DEFINE_integer("num_classes", None, "of a data set that is not here", lower_bound=2, flag_values=values)
    _workdir(values)
    flags.DEFINE_string("out", None, "file to write, if not plan.json in --workdir", flag_values=values)


def define_report(values: flags.FlagValues, arguments: list[str]) -> None:
    flags.DEFINE_string("out", None, "folder to write, if not report/ in the first DIR", flag_values=values)
    flags.DEFINE_string(
        "unit", None, "whose filters are shown firing together, if not that with most dynamic ones", flag_values=values
    )
