package main

import (
	"fmt"
	"math"
)

// model says how a quantity grows with the size of the mesh, as fitted to what was measured: a + b·x, or a·x^b.
type model struct {
	Power    bool    `json:"power"`
	A        float64 `json:"a"`
	B        float64 `json:"b"`
	Residual float64 `json:"residual"` // the largest deviation of what was measured from the model, as a part of the model
}

// fit is the model of two, a line and a power, that is closest to values at sizes xs: the squares of relative deviations
// are least, so that small sizes count as large ones do. All must be positive.
func fit(xs, values []float64) model {
	line, power := fitLine(xs, values), fitPower(xs, values)
	if power.Residual < line.Residual {
		return power
	}
	return line
}

func fitLine(xs, values []float64) model {
	weights := make([]float64, len(values))
	for i, y := range values {
		weights[i] = 1 / (y * y)
	}
	m := model{}
	m.A, m.B = regress(xs, values, weights)
	return m.judged(xs, values)
}

func fitPower(xs, values []float64) model {
	logs := func(of []float64) []float64 {
		all := make([]float64, len(of))
		for i, v := range of {
			all[i] = math.Log(v)
		}
		return all
	}
	weights := make([]float64, len(values))
	for i := range weights {
		weights[i] = 1
	}
	a, b := regress(logs(xs), logs(values), weights)
	return model{Power: true, A: math.Exp(a), B: b}.judged(xs, values)
}

// regress is the line a + b·x of the least weighted squares.
func regress(xs, ys, weights []float64) (a, b float64) {
	var w, wx, wy, wxx, wxy float64
	for i, x := range xs {
		w += weights[i]
		wx += weights[i] * x
		wy += weights[i] * ys[i]
		wxx += weights[i] * x * x
		wxy += weights[i] * x * ys[i]
	}
	if d := w*wxx - wx*wx; d != 0 {
		b = (w*wxy - wx*wy) / d
	}
	return (wy - b*wx) / w, b
}

func (m model) judged(xs, values []float64) model {
	for i, x := range xs {
		m.Residual = max(m.Residual, math.Abs(values[i]/m.at(x)-1))
	}
	return m
}

func (m model) at(x float64) float64 {
	if m.Power {
		return m.A * math.Pow(x, m.B)
	}
	return m.A + m.B*x
}

func (m model) String() string {
	if m.Power {
		return fmt.Sprintf("%s·x^%.2f", significant(m.A), m.B)
	}
	sign, b := "+", m.B
	if b < 0 {
		sign, b = "-", -b
	}
	return fmt.Sprintf("%s %s %s·x", significant(m.A), sign, significant(b))
}
