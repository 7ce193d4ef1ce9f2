package observe

import (
	"log/slog"
	"strings"
	"testing"
)

func TestConfigurationsThatCannotBe(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	for _, tt := range []struct {
		config Config
		want   string
	}{
		{Config{}, "no log"},
		{Config{Log: log, Groups: []string{"weather"}}, "no such group"},
		{Config{Log: log, Threads: []int{0}}, "not a thread"},
		{Config{Log: log, Threads: make([]int, threadsMax+1)}, "513 threads"},
		{Config{Log: log, Disks: []Number{{1 << 12, 0}}}, "not a device number"},
		{Config{Log: log, Disks: []Number{{0, 1 << 20}}}, "not a device number"},
		{Config{Log: log, Disks: make([]Number, watchedMax+1)}, "1025 disks"},
	} {
		if o, err := Start(tt.config); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q expected, got %v", tt.want, err)
			if err == nil {
				_ = o.Close()
			}
		}
	}
}
