#pragma once

#include "api.h"

namespace fqa {

// Loss, metrics and gradients of a batch of pairs; the formulas are those of fastqadapter/ops/preference_loss.py.
void preference_loss(const PreferenceLossCall& call);

}  // namespace fqa
