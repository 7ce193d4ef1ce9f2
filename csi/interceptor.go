package csi

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// unary counts and logs a call. Requests are not logged, only the names in them:
// they have secrets.
func (d *Driver) unary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (reply any, err error) {
	defer d.finish(info.FullMethod, request, time.Now(), &err)
	return handle(ctx, request)
}

func (d *Driver) stream(service any, s grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) (err error) {
	defer d.finish(info.FullMethod, nil, time.Now(), &err)
	return handle(service, s)
}

// finish ends a call; one that panicked, too: the other calls go on.
func (d *Driver) finish(fullMethod string, request any, began time.Time, err *error) {
	method := fullMethod[strings.LastIndexByte(fullMethod, '/')+1:]
	if p := recover(); p != nil {
		d.log.Error("call panicked", "method", method, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		*err = status.Errorf(codes.Internal, "%s: a bug of the driver; its log says more", method)
	}
	*err = problem(*err)
	took := time.Since(began)
	code := status.Code(*err)
	d.metrics.observe(method, code, took)
	level := slog.LevelInfo
	switch {
	case code != codes.OK:
		level = slog.LevelWarn
	case quiet(method):
		level = slog.LevelDebug
	}
	attributes := []any{"method", method, "code", code.String(), "took", took.Round(time.Millisecond)}
	if r, ok := request.(interface{ GetVolumeId() string }); ok {
		attributes = append(attributes, "volume", r.GetVolumeId())
	}
	if r, ok := request.(interface{ GetSnapshotId() string }); ok {
		attributes = append(attributes, "snapshot", r.GetSnapshotId())
	}
	if r, ok := request.(interface{ GetName() string }); ok {
		attributes = append(attributes, "name", r.GetName())
	}
	if *err != nil {
		attributes = append(attributes, "error", status.Convert(*err).Message())
	}
	d.log.Log(context.Background(), level, "call", attributes...)
}

// quiet says whether a method is called all the time and changes nothing.
func quiet(method string) bool {
	return method == "Probe" || strings.Contains(method, "Get") || strings.HasPrefix(method, "List")
}
