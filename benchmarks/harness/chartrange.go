package harness

import (
	"image/color"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// rangeLine is a vertical line from the lowest to the highest round of a bar.
// Plotter's error bars cannot be shifted to a bar of a group.
type rangeLine struct {
	x      float64
	offset vg.Length
	spread Spread
}

// Plot implements plot.Plotter.
func (l rangeLine) Plot(c draw.Canvas, p *plot.Plot) {
	toX, toY := p.Transforms(&c)
	x := toX(l.x) + l.offset
	style := draw.LineStyle{Color: color.Black, Width: vg.Points(1)}
	c.StrokeLine2(style, x, toY(l.spread.Min), x, toY(l.spread.Max))
}
