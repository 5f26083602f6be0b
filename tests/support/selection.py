"""Which tests are slow by what they need, and which files come first."""

# Fixtures that take seconds to minutes to make, the first time: a test that needs one, directly or not, is slow.
SLOW = {"aoti_bundle", "native_build", "shared_build", "bundle", "causal_bundle", "made", "amax", "trained_teacher",
        "student_file", "assembled"}  # fmt: skip
# Files that take longest, longest first, so that the processes of a run end at about the same time. The first two
# compile different things. Those after them find what these have compiled.
FIRST = (
    "test_aoti.py", "test_csrc.py", "test_export.py", "test_compile.py", "test_distill_training.py",
    "test_export_fp8.py", "test_tensorrt.py", "test_engine_launches.py", "test_bench_commands.py",
    "test_distill_tools.py", "test_run_cli.py", "test_native.py", "test_csrc_tokenizer.py", "test_parity.py",
    "test_bench_backends.py", "test_embedded.py", "test_scaling.py", "test_checkpoint.py", "test_generators.py",
)  # fmt: skip
