"""The committed code in teacher_api/v1 describes the messages of the .proto, and serves protobuf 6 as well as 7."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from teacher_api.v1 import teacher_pb2, teacher_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
V1 = ROOT / "teacher_api" / "v1"
AGAIN = "protos/teacher/v1/teacher.proto and teacher_api/v1 differ: run `python protos/generate.py` and commit"


def without_json_names(descriptor: FileDescriptorProto) -> FileDescriptorProto:
    """protoc adds them on request; Python's generated code leaves them out."""

    def clean(message):
        for field in message.field:
            field.ClearField("json_name")
        for nested in message.nested_type:
            clean(nested)

    for message in descriptor.message_type:
        clean(message)
    return descriptor


def test_the_generated_code_is_that_of_the_proto(tmp_path):
    out = tmp_path / "descriptors"
    virtual = f"-Iteacher_api/v1={ROOT / 'protos' / 'teacher' / 'v1'}"
    proto = ROOT / "protos" / "teacher" / "v1" / "teacher.proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", virtual, f"--descriptor_set_out={out}", str(proto)]
    subprocess.run(command, check=True)
    (compiled,) = FileDescriptorSet.FromString(out.read_bytes()).file
    committed = FileDescriptorProto.FromString(teacher_pb2.DESCRIPTOR.serialized_pb)
    assert without_json_names(committed) == without_json_names(compiled), AGAIN


def test_the_type_stubs_are_of_the_same_messages():
    tree = ast.parse((V1 / "teacher_pb2.pyi").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    messages = teacher_pb2.DESCRIPTOR.message_types_by_name
    assert set(messages) <= set(classes), AGAIN
    for name, descriptor in messages.items():
        annotated = {n.target.id for n in classes[name].body if isinstance(n, ast.AnnAssign)}
        assert {field.name for field in descriptor.fields} <= annotated, f"{name}: {AGAIN}"


def test_the_service_stub_has_every_method():
    service = teacher_pb2.DESCRIPTOR.services_by_name["TeacherService"]
    for method in service.methods:
        assert callable(getattr(teacher_pb2_grpc.TeacherServiceServicer, method.name)), AGAIN


def test_the_generated_code_asks_for_protobuf_6():
    stamp = re.search(r"^# Protobuf Python Version: (\d+)\.", (V1 / "teacher_pb2.py").read_text(), re.MULTILINE)
    assert stamp is not None
    assert stamp.group(1) == "6", "a newer compiler shuts out protobuf 6; protos/generate.py pins the right one"
