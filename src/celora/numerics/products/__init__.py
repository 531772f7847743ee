"""The products that estimators multiply with: in the dtype given, in int8, in fp8."""
