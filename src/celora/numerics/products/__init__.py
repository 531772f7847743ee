"""The products that estimators multiply with: in the gradient's dtype, in int8, in fp8."""
