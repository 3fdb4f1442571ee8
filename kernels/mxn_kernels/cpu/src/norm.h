// Root-mean-square normalisation of one row: y = x / sqrt(mean(x^2) + eps) * (weight + offset). y may be x.
#pragma once

void rms_norm_row(const float* x, const float* weight, int width, float eps, float offset, float* y);
