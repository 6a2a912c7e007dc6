// The pressure on a memory, and what a budget for a part of it should do about it. Between two marks nothing moves:
// above the high one as much is given back as is too much, below the low one as much is taken as stays under the high
// one.
#pragma once

namespace superllama {

struct pressure_marks {
    double high; // shares of the memory in use, 0..1
    double low;
    double margin; // growing stops so far below the high mark, so that it never triggers shrinking

    static double of(double total, double available) { return 1.0 - available / total; }

    // Bytes that the budget should have more, or less; 0 between the marks.
    double change(double total, double available) const {
        const double pressure = of(total, available);
        if (pressure > high) {
            return -(pressure - high) * total;
        }
        return pressure < low ? (high - margin - pressure) * total : 0;
    }
};

} // namespace superllama
